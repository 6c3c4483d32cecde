"""The report as Markdown, and the tables that it shares with the page."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from compress.report.collect import Collection, relative
from compress.report.comparison import Group, groups, pareto_front, statistic
from compress.report.finished import Run
from compress.report.replaced_project import FIGURES
from compress.results.tradeoff import Row

FILES = ("result.json", "tradeoff.csv", "tradeoff.png", "config.yaml", "metrics.csv", "run.log")
WIDTHS = (32, 8, 7, 6, 5, 4, 3, 2)
REFERENCE_NOTE = (
    "Test accuracy in %, ours as mean ± deviation over the seeds, beside it in brackets what the replaced project "
    "reported. It chose checkpoints and scales on the test set, and its KD, DML and DKD had mistakes."
)
NO_FIGURES = "Of this experiment no figures of the replaced project are known; ours, test accuracy in %."


@dataclass(frozen=True)
class Table:
    """A title, a sentence about it, and text in cells."""

    title: str
    note: str
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def run_files(run: Run) -> list[str]:
    """What a report links to, relative to the directory of `run`, of what is there."""
    names = dict.fromkeys((*FILES, *(row.file for row in run.rows)))
    return [name for name in names if (run.directory / name).is_file()]


def markdown(collection: Collection, path: Path, written: str) -> str:
    """The report for the file `path`, to which its links are relative; `written` is the time it will state."""
    found = groups(collection.runs)
    parts = [f"# Report of {len(collection.runs):,} runs\n\nWritten {written}."]
    for data in dict.fromkeys(group.runs[0].data for group in found):
        parts.append(_table(means_table(data, [group for group in found if group.runs[0].data == data])))
    parts += [_table(table) for table in reference_tables(found)]
    lines = []
    for run in collection.runs:
        directory = relative(run.directory, path)
        links = [f"[{_text(Path(name).name)}]({quote(f'{directory}/{name}')})" for name in run_files(run)]
        lines.append(f"- {_text(run.name)} ({_text(' '.join(run.overrides))}): {', '.join(links)}")
    parts.append("## Runs\n\n" + "\n".join(lines))
    missing = left_out(collection)
    if missing:
        parts.append("## Not in this report\n\n" + "\n".join(f"- {_text(line)}" for line in missing))
    return "\n\n".join(parts) + "\n"


def means_table(data: str, found: Sequence[Group]) -> Table:
    """A line per variant of each group, all of them on the same data, with the Pareto front marked."""
    variants = [(group, variant) for group in found for variant in group.variants]
    front = set(pareto_front([(variant.bytes, variant.test.mean) for _, variant in variants]))
    lines = []
    for index, (group, variant) in enumerate(variants):
        run = group.runs[0]
        lines.append(
            (
                run.method,
                run.student,
                group.settings,
                variant.row.name,
                str(variant.test.count),
                str(variant.test),
                "" if variant.validation is None else str(variant.validation),
                f"{variant.bytes / 1000:,.1f}",
                "" if variant.ratio is None else f"{variant.ratio:.1f}x",
                "●" if index in front else "",
            )
        )
    head = (
        "method",
        "student",
        "settings",
        "variant",
        "seeds",
        "test %",
        "validation %",
        "size, kB",
        "smaller",
        "front",
    )
    note = "Mean ± sample deviation over seeds. ● no other variant is both smaller and more accurate (Pareto front)."
    return Table(data, note, head, tuple(lines))


def reference_tables(found: Sequence[Group]) -> list[Table]:
    """Where runs are of an experiment of the replaced project: its figures beside ours.

    A line for each method and, in `ours`, the network, the data and the settings; methods that have no run come last.
    """
    tables = []
    for experiment, figures in FIGURES.items():
        rows: dict[tuple[str, str], list[Row]] = {}
        for group in (group for group in found if group.runs[0].experiment == experiment):
            run = group.runs[0]
            # qat is trained anew for each width, which makes one line all the same.
            settings = [each for each in group.settings.split() if not each.startswith("method.weight_bits=")]
            ours = rows.setdefault((run.method, ", ".join([run.student, run.data, *settings])), [])
            ours += [row for each in group.runs for row in each.rows if _counts(row, run.method)]
        if not rows:
            continue
        present = {method for method, _ in rows}
        rows |= {(method, ""): [] for method in figures if method not in present}
        lines = [
            (method, ours, *(_beside(own, figures.get(method, {}), bits) for bits in WIDTHS))
            for (method, ours), own in rows.items()
        ]
        head = ("method", "ours", *("fp32" if bits == 32 else f"{bits} bit" for bits in WIDTHS))
        title = f"The replaced project: {experiment}"
        tables.append(Table(title, REFERENCE_NOTE if figures else NO_FIGURES, head, tuple(lines)))
    return tables


def left_out(collection: Collection) -> list[str]:
    """A line for each directory or file that was found and could not be used."""
    return [*collection.problems, *(f"{each}: not finished" for each in collection.unfinished)]


def _counts(row: Row, method: str) -> bool:
    # The float weights behind the grids of qat were never meant to be used without them.
    own = row.quantizer == "lsq" if method == "qat" else row.quantizer != "lsq"
    return own and row.activation_bits in (None, 32)


def _beside(rows: Sequence[Row], figures: Mapping[int, Sequence[float]], bits: int) -> str:
    """Our accuracy at that width, then theirs in brackets."""
    ours = statistic(100 * row.test_accuracy for row in rows if row.bits == bits)
    theirs = " to ".join(f"{value:.2f}" for value in figures.get(bits, ()))
    return " ".join(([str(ours)] if ours else []) + ([f"({theirs})"] if theirs else []))


def _table(table: Table) -> str:
    lines = [table.head, ("---",) * len(table.head), *(tuple(map(_text, line)) for line in table.lines)]
    return f"## {_text(table.title)}\n\n{table.note}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: str) -> str:
    """As it is, in Markdown: nothing in it is a tag, a link, emphasis or the border of a cell."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", " ".join(text.split()))
