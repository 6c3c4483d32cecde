"""What the launchers have in common: each job goes to a process of its own, and one that dies is a job that failed."""

import os
import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import run_job
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, open_dict

from compress.config import compose as configuration
from compress.progress import console
from compress.sweeps.outcomes import outcome, record_failure

OUTPUT = "output.txt"


@dataclass(frozen=True)
class Call:
    """One job in words and names that any process can act on which has this package and sees the same files."""

    task: TaskFunction
    overrides: tuple[str, ...]
    number: int
    directory: Path
    working_directory: Path

    def __call__(self) -> None:
        os.chdir(self.working_directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        stream = (self.directory / OUTPUT).open("a", buffering=1, encoding="utf-8")
        with stream, redirect_stdout(stream), redirect_stderr(stream):
            self._run()

    def _run(self) -> None:
        configuration.register()
        with configuration.initialize():
            loader = GlobalHydra.instance().config_loader()
            config = loader.load_configuration("run", list(self.overrides), RunMode.RUN)
            with open_dict(config):
                config.hydra.job.num = self.number
                config.hydra.job.id = str(self.number)
            ended = run_job(
                task_function=self.task,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
                hydra_context=HydraContext(config_loader=loader, callbacks=Callbacks(config)),
            )
            _ = ended.return_value  # raises what the job raised


class SeparateLauncher(Launcher):
    """Says in `run` how calls are run elsewhere."""

    library: ClassVar[str]  # the module that has to be installed, and the extra that brings it

    def check(self) -> None:
        """Raises UserError where the launcher cannot work here."""

    @abstractmethod
    def run(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Exception | None]]:
        """Runs all `calls` and gives each as it ends; with an exception where its process did not live to its end."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.task = task_function
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        own = list(self.config.hydra.overrides.hydra)
        directory = Path(self.config.hydra.sweep.dir)
        calls = []
        for place, overrides in enumerate(job_overrides, initial_job_idx):
            typed = [each for each in overrides if each.startswith("hydra.sweep.subdir=")]
            number = int(typed[-1].partition("=")[2]) if typed else place
            calls.append(Call(self.task, (*own, *overrides), number, directory / str(number), Path.cwd()))
        console.print(f"{len(calls)} jobs by {self.library}, what they say is in {directory}/NUMBER/{OUTPUT}")
        for count, (call, failure) in enumerate(self.run(calls), 1):
            if failure is not None and outcome(call.directory).state == "not finished":
                record_failure(call.directory, failure, f"The process of the job died.\n\n{failure}")
            ended = outcome(call.directory)
            console.print(f"  {count} of {len(calls)}: job {call.number} {ended}", markup=False)
            sys.stdout.flush()
        return []
