"""Runs of several methods and seeds as one table: test accuracy per width, mean and deviation over the seeds."""

from collections.abc import Iterable, Mapping, Sequence

from compress.report.comparison import statistic
from compress.results.tradeoff import Row


def study_table(runs: Mapping[str, Sequence[Iterable[Row]]]) -> str:
    """A Markdown table with a line per method and a column per width, from the trade-off rows of each seed's run.

    A cell is the mean test accuracy in percent and, from two seeds on, the sample standard deviation. A method trained
    for its widths has one run per seed that holds the rows of all of them; `lsq` and solvers share the columns.
    """
    widths = sorted({_column(row) for seeds in runs.values() for rows in seeds for row in rows}, reverse=True)
    lines = ["| method | " + " | ".join("fp32" if width == 32 else f"{width} bit" for width in widths) + " |"]
    lines.append("|---" * (len(widths) + 1) + "|")
    for method, seeds in runs.items():
        cells = []
        for width in widths:
            accuracies = [100 * row.test_accuracy for rows in seeds for row in rows if _column(row) == width]
            cells.append(str(statistic(accuracies) or ""))
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _column(row: Row) -> int:
    return 32 if row.quantizer == "none" else row.bits
