"""The report as Markdown, and the tables that it shares with the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from compress.report.collect import Collection, relative
from compress.report.comparison import Group, Variant, groups, pareto_front, statistic
from compress.report.finished import Run
from compress.report.replaced_project import FIGURES
from compress.results.markdown import escaped, markdown_table
from compress.results.tradeoff import Row, columns_of, figures

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
    compared = groups(collection.runs)
    number = len(collection.runs)
    parts = [f"# Report of {number:,} {'run' if number == 1 else 'runs'}\n\nWritten {written}."]
    for data in dict.fromkeys(group.runs[0].data for group in compared):
        parts.append(_table(means_table(data, [group for group in compared if group.runs[0].data == data])))
    parts += [_table(table) for table in reference_tables(compared)]
    lines = []
    for run in collection.runs:
        directory = relative(run.directory, path)
        links = [f"[{escaped(Path(name).name)}]({quote(f'{directory}/{name}')})" for name in run_files(run)]
        lines.append(f"- {escaped(run.name)} ({escaped(' '.join(run.record.overrides))}): {', '.join(links)}")
    parts.append("## Runs\n\n" + "\n".join(lines))
    missing = left_out(collection)
    if missing:
        parts.append("## Not in this report\n\n" + "\n".join(f"- {escaped(line)}" for line in missing))
    return "\n\n".join(parts) + "\n"


def means_table(data: str, compared: Sequence[Group]) -> Table:
    """A line per variant of each group, all of them on the same data, with the Pareto front marked."""
    variants = [(group, variant) for group in compared for variant in group.variants]
    front = set(pareto_front([(variant.bytes, variant.test_accuracy) for _, variant in variants]))
    lines = []
    for index, (group, variant) in enumerate(variants):
        run = group.runs[0]
        cells = [run.method, run.student, group.settings, variant.row.name, str(len(variant.rows))]
        lines.append((*cells, *figure_cells(group, variant), "●" if index in front else ""))
    headings = [column.heading for column in columns_of("markdown").values()]
    head = ("method", "student", "settings", "variant", "seeds", *headings, "front")
    note = (
        "Mean ± sample deviation over seeds. ● no other variant is both smaller and more accurate (Pareto front). "
        "Speed: against fp32 in the same runtime, with ! where it is slower."
    )
    return Table(data, note, head, tuple(lines))


def figure_cells(group: Group, variant: Variant) -> list[str]:
    """Of a `variant` of the `group`, the mean in each column of Markdown, with its deviation where that is shown."""
    means = figures("markdown", variant.mean, group.reference(variant))
    cells = []
    for key, column in columns_of("markdown").items():
        deviation = variant.deviation(key) if column.deviation else None
        cells.append(column.printed(means[key]) + ("" if deviation is None else f" ± {column.printed(deviation)}"))
    return cells


def reference_tables(compared: Sequence[Group]) -> list[Table]:
    """Where runs are of an experiment of the replaced project: its figures beside ours.

    A line for each method and, in `ours`, the network, the data and the settings; methods that have no run come last.
    """
    tables = []
    for experiment, reported in FIGURES.items():
        rows: dict[tuple[str, str], list[Row]] = {}
        for group in (group for group in compared if group.runs[0].experiment == experiment):
            run = group.runs[0]
            # qat is trained anew for each width, which makes one line all the same.
            settings = [word for word in group.settings.split() if not word.startswith("method.weight_bits=")]
            ours = rows.setdefault((run.method, ", ".join([run.student, run.data, *settings])), [])
            ours += [row for member in group.runs for row in member.rows if _counts(row, run.method)]
        if not rows:
            continue
        present = {method for method, _ in rows}
        rows |= {(method, ""): [] for method in reported if method not in present}
        lines = [
            (method, ours, *(_compared(members, reported.get(method, {}), bits) for bits in WIDTHS))
            for (method, ours), members in rows.items()
        ]
        head = ("method", "ours", *("fp32" if bits == 32 else f"{bits} bit" for bits in WIDTHS))
        title = f"The replaced project: {experiment}"
        tables.append(Table(title, REFERENCE_NOTE if reported else NO_FIGURES, head, tuple(lines)))
    return tables


def left_out(collection: Collection) -> list[str]:
    """A line for each directory or file that could not be used."""
    return [*collection.problems, *(f"{directory}: not finished" for directory in collection.unfinished)]


def _counts(row: Row, method: str) -> bool:
    """Whether the replaced project had such a variant."""
    return row.trained_on_grids == (method == "qat") and row.activation_bits == 32 and not row.coded


def _compared(rows: Sequence[Row], reported: Mapping[int, Sequence[float]], bits: int) -> str:
    """Our accuracy at that width, then theirs in brackets."""
    ours = statistic([100 * row.accuracy_on("test") for row in rows if row.bits == bits])
    theirs = " to ".join(f"{value:.2f}" for value in reported.get(bits, ()))
    return " ".join(([str(ours)] if ours else []) + ([f"({theirs})"] if theirs else []))


def _table(table: Table) -> str:
    lines = markdown_table(table.head, [map(escaped, line) for line in table.lines])
    return f"## {escaped(table.title)}\n\n{table.note}\n\n{lines}"
