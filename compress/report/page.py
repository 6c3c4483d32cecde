"""The report as one HTML page that needs no network: the data as JSON, plotly.js and the page's own script inside.

What varies with the reader's choices (table, charts, details) is drawn by `page/*.js` from the JSON, what does not is
written here. All text that comes from runs is escaped in both.
"""

import html
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from compress.errors import UserError
from compress.report.collect import Collection, relative
from compress.report.comparison import Group, Statistic, groups
from compress.report.finished import Run
from compress.report.tables import left_out, reference_tables, run_files
from compress.results.tradeoff import Row

PAGE = Path(__file__).parent / "assets"
# Shown for a run where they exist, beside its model files.
COLUMNS = (
    "runs",
    "name",
    "data",
    "method",
    "student",
    "teacher",
    "settings",
    "seed",
    "variant",
    "quantizer",
    "bits",
    "test",
    "test_deviation",
    "validation",
    "validation_deviation",
    "change",
    "bytes",
    "ratio",
    "agreement",
    "latency",
    "file",
)


def page(collection: Collection, path: Path, written: str) -> str:
    """The page for the file `path`, to which its links are relative; `written` is the time it will state.

    Raises UserError, which names the extra, where plotly is not installed.
    """
    found = groups(collection.runs)
    number = {run.name: index for index, run in enumerate(collection.runs)}
    settings = {run.name: group.settings for group in found for run in (*group.runs, *group.repeated)}
    content = {
        "runs": [_run(run, path) for run in collection.runs],
        "columns": COLUMNS,
        "means": [line for group in found for line in _mean_lines(group, number)],
        "each": [line for run in collection.runs for line in _run_lines(run, number, settings[run.name])],
    }
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    parts = {
        "title": html.escape(title(collection)),
        "subtitle": html.escape(subtitle(collection, written)),
        "style": (PAGE / "page.css").read_text(encoding="utf-8"),
        "plotly": plotly_script(),
        # A script element ends at the first `</`, whatever JSON thinks of it.
        "content": text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"),
        "script": "\n".join((PAGE / f"{name}.js").read_text(encoding="utf-8") for name in ("table", "charts", "page")),
        "reference": _reference(found),
        "left_out": _left_out(collection),
    }
    template = (PAGE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def plotly_script() -> str:
    """plotly.js, minified. Raises UserError where it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("plotly is not installed; pip install 'compress[report]'") from None
    return get_plotlyjs()


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


def _run(run: Run, path: Path) -> dict[str, Any]:
    directory = relative(run.directory, path)
    facts = {
        "data": run.data,
        "training images": run.train_images,
        "seed": str(run.seed),
        "parameters": run.parameters,
        "epochs": run.epochs,
        "teacher": run.teacher or None,
        "teacher, test %": None if run.teacher_accuracy is None else f"{100 * run.teacher_accuracy:.2f}",
        "started": run.started.replace("T", " ")[:16] or None,
        "duration": _duration(run.seconds),
    }
    return {
        "name": run.name,
        "facts": [
            [key, f"{value:,}" if isinstance(value, int) else value]
            for key, value in facts.items()
            if value is not None
        ],
        "command": "python scripts/run.py " + shlex.join(run.overrides),
        "links": [[name, quote(f"{directory}/{name}")] for name in run_files(run)],
        "curves": {
            name: [[_short(value) for value in axis] for axis in curve] for name, curve in sorted(run.curves.items())
        },
        "layers": {
            file: [
                [layer.name for layer in layers],
                [layer.bits for layer in layers],
                [_short(layer.error) for layer in layers],
            ]
            for file, layers in run.layers.items()
        },
    }


def _mean_lines(group: Group, number: Mapping[str, int]) -> list[list[Any]]:
    run, reference = group.runs[0], _float_row(group)
    return [
        [
            [number[each.name] for each in group.runs],
            "",
            run.data,
            run.method,
            run.student,
            run.teacher,
            group.settings,
            variant.test.count,
            variant.row.name,
            variant.row.quantizer,
            variant.row.bits,
            *_mean_and_deviation(variant.test),
            *_mean_and_deviation(variant.validation),
            None if reference is None or variant is reference else _short(variant.test.mean - reference.test.mean),
            round(variant.bytes),
            _short(variant.ratio),
            _mean_and_deviation(variant.agreement)[0],
            _mean_and_deviation(variant.latency)[0],
            variant.row.file,
        ]
        for variant in group.variants
    ]


def _float_row(group: Group) -> Any:
    return next((variant for variant in group.variants if variant.row.quantizer == "none"), None)


def _run_lines(run: Run, number: Mapping[str, int], settings: str) -> list[list[Any]]:
    reference = next((row for row in run.rows if row.quantizer == "none"), None)
    return [_run_line(run, row, reference, number[run.name], settings) for row in run.rows]


def _run_line(run: Run, row: Row, reference: Row | None, number: int, settings: str) -> list[Any]:
    return [
        [number],
        run.name,
        run.data,
        run.method,
        run.student,
        run.teacher,
        settings,
        run.seed,
        row.name,
        row.quantizer,
        row.bits,
        _percent(row.test_accuracy),
        None,
        _percent(row.validation_accuracy),
        None,
        None if reference is None or row is reference else _percent(row.test_accuracy - reference.test_accuracy),
        row.bytes,
        _short(row.ratio),
        _percent(row.agreement),
        _short(row.latency_ms),
        row.file,
    ]


def _mean_and_deviation(value: Statistic | None) -> tuple[float | None, float | None]:
    return (None, None) if value is None else (_short(value.mean), _short(value.deviation))


def _percent(share: float | None) -> float | None:
    return None if share is None else _short(100 * share)


def _short(value: float | None) -> float | None:
    """Six digits, which is more than a screen shows and half the size of the page."""
    return None if value is None else float(f"{value:.6g}")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _reference(found: Sequence[Group]) -> str:
    parts = []
    for table in reference_tables(found):
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
