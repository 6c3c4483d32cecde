"""`scripts/report.py`: every run below some directories as a page, as Markdown, as CSV or as a picture."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from compress.errors import UserError
from compress.files import write_text
from compress.report.collect import Collection, collect, write_summary
from compress.report.page import page, plotly_script
from compress.report.tables import markdown

SUFFIXES = (".html", ".md", ".csv", ".png")


def write_reports(paths: Sequence[Path], outputs: Sequence[Path]) -> Collection:
    """Writes a report of all runs in and below `paths` to each of `outputs`, in the format that its suffix names.

    Returns what was read, with what had to be left out. Raises UserError for what is wrong before anything is
    written.
    """
    for output in outputs:
        if output.suffix.lower() not in SUFFIXES:
            raise UserError(f"{output}: found the suffix {output.suffix!r}; accepted: {', '.join(SUFFIXES)}")
        if output.is_dir():
            raise UserError(f"{output}: found a directory; accepted: a file to write")
        if output.suffix.lower() == ".html":
            plotly_script()
    collection = collect(paths)
    written = f"{datetime.now():%Y-%m-%d %H:%M}"
    for output in outputs:
        try:
            match output.suffix.lower():
                case ".html":
                    write_text(output, page(collection, output, written))
                case ".md":
                    write_text(output, markdown(collection, output, written))
                case ".csv":
                    write_summary(output, collection.runs)
                case ".png":
                    # Matplotlib takes a second to import, which the page need not wait.
                    from compress.report.runs_picture import draw_runs

                    draw_runs(output, collection.runs)
        except OSError as failure:
            raise UserError(f"{output}: cannot be written ({failure.strerror}); accepted: a file to write") from None
    return collection
