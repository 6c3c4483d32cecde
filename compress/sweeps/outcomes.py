"""How the jobs of a sweep ended, read from their directories; needs neither PyTorch nor Hydra.

A finished job has a `result.json`, a failed one a `failed.txt`: one line that says why and, unless the user can mend
it, the traceback. A job with neither has not been run to its end yet.
"""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from compress.errors import UserError, first_line
from compress.files import write_text
from compress.report.collect import collect, write_summary
from compress.results.record import FILE, Record
from compress.results.tradeoff import COLUMNS, Row

FAILED = "failed.txt"
USER_ERROR = "error: "
COLOURS = {"finished": "green", "failed": "red", "not finished": "yellow"}


@dataclass(frozen=True)
class Outcome:
    """`state` is finished, failed or not finished; `reason` one line for the second, `rows` for the first."""

    state: str
    reason: str = ""
    rows: tuple[Row, ...] = ()

    @property
    def users_mistake(self) -> bool:
        return self.reason.startswith(USER_ERROR)

    def __str__(self) -> str:
        if self.rows:
            meant = next((row for row in self.rows if row.trained_on_grids), self.rows[0])
            return f"finished, {COLUMNS['test_accuracy'].printed(meant.test_accuracy)} % on test"
        return f"{self.state}: {self.reason}" if self.reason else self.state


def record_failure(directory: Path, failure: BaseException, details: str | None = None) -> None:
    """Leaves why the job in `directory` failed; `details`, or else the traceback, unless the user can mend it."""
    message = first_line(failure)
    if isinstance(failure, UserError):
        write_text(directory / FAILED, f"{USER_ERROR}{message}\n")
    else:
        details = details or "".join(traceback.format_exception(failure))
        write_text(directory / FAILED, f"{type(failure).__name__}: {message}\n\n{details.rstrip()}\n")


def outcome(directory: Path) -> Outcome:
    """How the job in `directory` ended, if it did."""
    path = directory / FILE
    if path.exists():
        try:
            return Outcome("finished", rows=Record.read(path).rows)
        except UserError as damage:
            return Outcome("failed", f"{USER_ERROR}{damage}")
    if (directory / FAILED).exists():
        return Outcome("failed", (directory / FAILED).read_text(encoding="utf-8").partition("\n")[0])
    return Outcome("not finished")


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 where all are finished, 2 where only mistakes of the user kept some from it, otherwise 1."""
    missing = [outcome for outcome in outcomes if outcome.state != "finished"]
    return 0 if not missing else 2 if all(outcome.users_mistake for outcome in missing) else 1


def summarise(directory: Path) -> list[str]:
    """Writes `summary.csv` where a job in `directory` is finished, and returns what could not be read."""
    try:
        collection = collect([directory])
    except UserError:
        return []
    write_summary(directory / "summary.csv", collection.runs)
    return list(collection.problems)


def varying(job: Sequence[str], jobs: Sequence[Sequence[str]]) -> str:
    """The overrides that distinguish a `job` from the others."""
    return " ".join(override for override in job if any(override not in other for other in jobs))


def sweep_table(title: str, jobs: Sequence[Sequence[str]], outcomes: Sequence[Outcome]) -> Table:
    """A line per job: what distinguishes it, how it ended, and the first and the smallest of its variants."""
    printed = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", collapse_padding=True, pad_edge=False)
    printed.add_column("job", justify="right", no_wrap=True)
    printed.add_column("what varies", overflow="fold")
    printed.add_column("outcome", no_wrap=True)
    printed.add_column("fp32 %", justify="right", no_wrap=True)
    printed.add_column("smallest", no_wrap=True)
    accuracy, size = COLUMNS["test_accuracy"], COLUMNS["bytes"]
    for column in (accuracy, size):
        printed.add_column(column.heading, justify="right", no_wrap=True)
    for number, (job, ended) in enumerate(zip(jobs, outcomes, strict=True)):
        cells = ["", "", "", ""]
        if ended.rows:
            smallest = min(ended.rows, key=lambda row: row.bytes)
            cells = [accuracy.printed(ended.rows[0].test_accuracy), smallest.name]
            cells += [accuracy.printed(smallest.test_accuracy), size.printed(smallest.bytes)]
        state = f"[{COLOURS[ended.state]}]{ended.state}[/]"
        printed.add_row(str(number), escape(varying(job, jobs)), state, *cells)
    return printed
