"""What the launchers have in common: each job goes to a process of its own, and one that dies is a job that failed."""

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from compress.paths import import_from_here, searching, user_folders
from compress.progress import console
from compress.sweeps.outcomes import outcome, record_failure
from compress.sweeps.perform import perform_alone

OUTPUT = "output.txt"


@dataclass(frozen=True)
class Call:
    """One job in words and names that any process can act on which has this package and sees the same files.

    `overrides`, `settings` and `hydra` are those of `compress.sweeps.perform.job_in`.
    """

    overrides: tuple[str, ...]
    settings: tuple[str, ...]
    hydra: tuple[str, ...]
    number: int
    directory: Path
    working_directory: Path
    folders: tuple[Path, ...] = field(default_factory=lambda: tuple(user_folders()))

    def __call__(self) -> None:
        os.chdir(self.working_directory)
        import_from_here()
        self.directory.mkdir(parents=True, exist_ok=True)
        stream = (self.directory / OUTPUT).open("a", buffering=1, encoding="utf-8")
        with stream, redirect_stdout(stream), redirect_stderr(stream), searching(self.folders):
            perform_alone(self.directory, self.overrides, self.settings, self.hydra, self.number)


class SeparateLauncher(ABC):
    """Says in `run` how calls are run elsewhere."""

    library: ClassVar[str]  # the module that has to be installed, and the extra that brings it

    def check(self) -> None:  # noqa: B027 - a launcher need not have one
        """Raises UserError where the launcher cannot work here."""

    @abstractmethod
    def run(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Exception | None]]:
        """Runs all `calls` and gives each as it ends; with an exception where its process did not live to its end."""

    def launch(self, calls: Sequence[Call], directory: Path) -> None:
        """Runs all `calls` of the sweep in `directory` and prints how each ended."""
        console.print(f"{len(calls)} jobs by {self.library}, what they say is in {directory}/NUMBER/{OUTPUT}")
        for count, (call, failure) in enumerate(self.run(calls), 1):
            if failure is not None and outcome(call.directory).state == "not finished":
                record_failure(call.directory, failure, f"The process of the job died.\n\n{failure}")
            ended = outcome(call.directory)
            console.print(f"  {count} of {len(calls)}: job {call.number} {ended}", markup=False)
            sys.stdout.flush()
