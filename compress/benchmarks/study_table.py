"""Runs of several methods and seeds as one table: test accuracy per width, mean and deviation over the seeds."""

from collections.abc import Iterable, Mapping, Sequence

from compress.report.comparison import statistic
from compress.results.markdown import markdown_table
from compress.results.tradeoff import Row


def study_table(runs: Mapping[str, Sequence[Iterable[Row]]]) -> str:
    """A Markdown table with a line per method and a column per width and rate, from the rows of each seed's run.

    A cell is the mean test accuracy in percent and, from two seeds on, the sample standard deviation. A method trained
    for its widths has one run per seed that holds the rows of all of them; `lsq` and solvers share the columns.
    """
    known = {_column(row) for seeds in runs.values() for rows in seeds for row in rows}
    columns = sorted(known, key=lambda column: (column[0], -column[1]))
    lines = []
    for method, seeds in runs.items():
        lines.append([f"`{method}`"])
        for column in columns:
            accuracies = [100 * row.accuracy_on("test") for rows in seeds for row in rows if _column(row) == column]
            lines[-1].append(str(statistic(accuracies) or ""))
    return markdown_table(["method", *(name for _, _, name in columns)], lines) + "\n"


def _column(row: Row) -> tuple[bool, float, str]:
    """Widths come before rates, and the float network first."""
    return row.coded, row.bits, row.width
