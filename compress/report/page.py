"""The report as one HTML page that needs no network: the data as JSON, plotly.js and the page's own script inside.

What varies with the reader's choices (table, charts, details) is drawn by `assets/*.js` from the JSON, what does not is
written here. All text that comes from runs is escaped in both.
"""

import html
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from compress.errors import UserError
from compress.report.collect import Collection, relative
from compress.report.comparison import Group, Variant, groups
from compress.report.finished import Run
from compress.report.tables import left_out, reference_tables, run_files
from compress.results.tradeoff import Column, columns_of, figures

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("table.js", "charts.js", "page.js")
# What a line has before the columns of the trade-off: places of its runs, what they were, and which variant it is.
IDENTITY = ("runs", "data", "method", "student", "teacher", "settings", "seeds", "variant", "quantizer", "bits", "file")


def page(collection: Collection, path: Path, written: str) -> str:
    """The page for the file `path`, to which its links are relative; `written` is the time it will state.

    Raises UserError, which names the extra, where plotly is not installed.
    """
    compared = groups(collection.runs)
    number = {run.name: index for index, run in enumerate(collection.runs)}
    settings = {run.name: group.settings for group in compared for run in (*group.runs, *group.repeated)}
    columns = columns_of("page")
    single = [
        Group((run,), (), settings[run.name], tuple(Variant((row,)) for row in run.rows)) for run in collection.runs
    ]
    content = {
        "runs": [_run(run, path) for run in collection.runs],
        "keys": [*IDENTITY, *columns, *(f"{key}_deviation" for key, column in columns.items() if column.deviation)],
        "columns": [_column(key, column) for key, column in columns.items()],
        "means": [line for group in compared for line in _lines(group, number)],
        "single": [line for group in single for line in _lines(group, number)],
    }
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    parts = {
        "title": html.escape(title(collection)),
        "subtitle": html.escape(subtitle(collection, written)),
        "style": (ASSETS / "page.css").read_text(encoding="utf-8"),
        "plotly": plotly_script(),
        # A script element ends at the first `</`, whatever JSON thinks of it.
        "content": text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"),
        "script": "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "reference": _reference(compared),
        "left_out": _left_out(collection),
    }
    template = (ASSETS / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def plotly_script() -> str:
    """plotly.js, minified. Raises UserError where it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("plotly is not installed; pip install 'compress[report]'") from None
    script: str = get_plotlyjs()
    return script


def title(collection: Collection) -> str:
    names = sorted({run.data for run in collection.runs})
    return "Accuracy per byte: " + (" and ".join(names) if len(names) <= 2 else f"{len(names)} data sets")


def subtitle(collection: Collection, written: str) -> str:
    runs = collection.runs
    counts = {
        "run": len(runs),
        "variant": sum(len(run.rows) for run in runs),
        "method": len({run.method for run in runs}),
        "student": len({run.student for run in runs}),
    }
    parts = [f"{count:,} {word}" + ("" if count == 1 else "s") for word, count in counts.items()]
    return " · ".join([*parts, f"written {written}"])


def _column(key: str, column: Column) -> dict[str, Any]:
    """What the page's script needs to know to print a column."""
    names = ("heading", "meaning", "scale", "digits", "suffix", "signed", "deviation", "below_one")
    return {"key": key, **{name: getattr(column, name) for name in names}}


def _run(run: Run, path: Path) -> dict[str, Any]:
    directory = relative(run.directory, path)
    return {
        "name": run.name,
        "seed": run.seed,
        "facts": _facts(run),
        "command": "python scripts/run.py " + shlex.join(run.record.overrides),
        "links": [[name, quote(f"{directory}/{name}")] for name in run_files(run)],
        "curves": {
            name: [[_short(value) for value in axis] for axis in curve] for name, curve in sorted(run.curves.items())
        },
        "layers": {
            row.file: [
                list(layers),
                [layer.bits for layer in layers.values()],
                [_short(layer.error) for layer in layers.values()],
            ]
            for row in run.rows
            if (layers := run.layers(row))
        },
    }


def _facts(run: Run) -> list[tuple[str, str]]:
    """What the page says of a chosen run, without what is not known."""
    record, teacher = run.record, run.record.teacher
    facts = {
        "data": run.data,
        "training images": record.data.images.get("train"),
        "seed": str(run.seed),
        "parameters": record.student.parameters,
        "epochs": record.student.epochs,
        "teacher": run.teacher or None,
        "teacher, test %": f"{100 * teacher.test_accuracy:.2f}" if teacher and teacher.test_accuracy else None,
        "started": record.started.replace("T", " ")[:16] or None,
        "duration": _duration(sum(record.seconds.values())),
    }
    return [
        (key, f"{value:,}" if isinstance(value, int) else value) for key, value in facts.items() if value is not None
    ]


def _lines(group: Group, number: Mapping[str, int]) -> list[list[Any]]:
    """A line for each variant of the group, its figures in the units of the files."""
    runs, run = [number[member.name] for member in group.runs], group.runs[0]
    shared = [runs, run.data, run.method, run.student, run.teacher, group.settings]
    columns = columns_of("page")
    lines = []
    for variant in group.variants:
        row = variant.row
        means = figures("page", variant.mean, group.reference(variant))
        deviations = [variant.deviation(key) for key, column in columns.items() if column.deviation]
        identity = [len(variant.rows), row.name, row.quantizer, row.bits, row.file]
        lines.append([*shared, *identity, *map(_short, means.values()), *map(_short, deviations)])
    return lines


def _short(value: float | None) -> float | None:
    """At least six digits, which is more than a screen shows and half the size of the page; None for no number."""
    if value is None or not math.isfinite(value):
        return None
    return round(value) if abs(value) > 1e5 else float(f"{value:.6g}")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _reference(compared: Sequence[Group]) -> str:
    parts = []
    for table in reference_tables(compared):
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in table.lines
        )
        parts.append(
            f"<section><h2>{html.escape(table.title)}</h2><p>{html.escape(table.note)}</p><div class='scroll'>"
            f"<table class='plain'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
        )
    return "".join(parts)


def _left_out(collection: Collection) -> str:
    lines = left_out(collection)
    if not lines:
        return ""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<section id='left-out'><h2>Not in this report</h2><ul>{items}</ul></section>"
