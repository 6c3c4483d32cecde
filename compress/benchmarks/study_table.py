"""Runs of several methods and seeds as one table: test accuracy per width, mean and deviation over the seeds."""

from collections.abc import Iterable, Mapping, Sequence

from compress.report.comparison import statistic
from compress.report.tables import markdown_table
from compress.results.tradeoff import Row


def study_table(runs: Mapping[str, Sequence[Iterable[Row]]]) -> str:
    """A Markdown table with a line per method and a column per width, from the trade-off rows of each seed's run.

    A cell is the mean test accuracy in percent and, from two seeds on, the sample standard deviation. A method trained
    for its widths has one run per seed that holds the rows of all of them; `lsq` and solvers share the columns.
    """
    widths = sorted({_column(row) for seeds in runs.values() for rows in seeds for row in rows}, reverse=True)
    head = ["method", *("fp32" if width == 32 else f"{width} bit" for width in widths)]
    lines = []
    for method, seeds in runs.items():
        lines.append([f"`{method}`"])
        for width in widths:
            accuracies = [100 * row.accuracy_on("test") for rows in seeds for row in rows if _column(row) == width]
            lines[-1].append(str(statistic(accuracies) or ""))
    return markdown_table(head, lines) + "\n"


def _column(row: Row) -> float:
    return 32 if row.quantizer == "none" else row.bits
