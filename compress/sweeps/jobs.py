"""A sweep: every job is run, by whatever launcher, one that fails ends no other, and what is missing can be run later.

Its directory holds `sweep.yaml` (the jobs and who runs them), a numbered directory per job, and `summary.csv`.
"""

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import yaml
from filelock import FileLock, Timeout
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig
from pydantic import TypeAdapter
from rich.markup import escape

from compress import yaml_file
from compress.arguments import check_arguments, imported
from compress.checksums import read_text
from compress.config.compose import SEARCH_PATH, Job, compose_jobs, initialized, is_for_hydra, key_of, parse
from compress.config.received import allowing, check_overrides, check_typed
from compress.config.recorded import check_settings
from compress.config.roles import register
from compress.data.shared import DataSets
from compress.errors import UserError, printable
from compress.files import write_yaml
from compress.pipeline.resume import directory_for
from compress.progress import console
from compress.stopping import command, under_way
from compress.sweeps.launchers.separate import Call, SeparateLauncher
from compress.sweeps.outcomes import exit_code, outcome, summarise, sweep_table, varying
from compress.sweeps.perform import hydra_task, job_in, perform

SWEEP = "sweep.yaml"
# What a sweep decides itself: jobs are expanded before they are checked, and lie in numbered directories.
NOT_OF_THE_USER = ("hydra/sweeper", "hydra.sweeper", "hydra.sweep.subdir", "hydra.job.num")
PLACE = ("hydra.sweep.dir", "hydra.mode")
BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


@dataclass(frozen=True)
class Sweep:
    """`jobs`: the overrides of each, its number being its place; `hydra`: those for Hydra itself, the launcher's.

    `hydra` are applied only by the process in which they were typed: a file that brings them may be somebody else's.
    `settings` are overrides of trainer.* and logger.* that were typed when the sweep was resumed, for all its jobs.
    """

    directory: Path
    jobs: tuple[tuple[str, ...], ...]
    hydra: tuple[str, ...]
    settings: tuple[str, ...] = ()

    def place(self, number: int) -> Path:
        return self.directory / str(number)

    def words(self) -> list[str]:
        """What has to be typed to go on with it, by the same launcher."""
        launcher = filter(_is_for_launcher, self.hydra)
        return [f"sweep={self.directory}", *launcher, *allowing(overrides=chain.from_iterable(self.jobs))]

    def missing(self) -> list[int]:
        """The numbers of the jobs that are not finished."""
        return [number for number in range(len(self.jobs)) if outcome(self.place(number)).state != "finished"]


def start(jobs: Sequence[Job], overrides: Sequence[str], data_sets: DataSets) -> int:
    """Runs the checked `jobs` of the command line `overrides` in a new directory; returns the exit code."""
    check_typed(chain.from_iterable(job.overrides for job in jobs))
    directory = directory_for("sweep", jobs[0], overrides, f"{datetime.now():%Y-%m-%d_%H-%M-%S}")
    hydra = tuple(override for override in overrides if is_for_hydra(override) and key_of(override) not in PLACE)
    sweep = Sweep(directory, tuple(job.overrides for job in jobs), hydra)
    content = {"hydra": list(hydra), "jobs": [list(job) for job in sweep.jobs]}
    write_yaml(directory / SWEEP, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000))
    with _alone(directory):
        return _run(sweep, dict(enumerate(jobs)), data_sets)


def resume(directory: Path, overrides: Sequence[str] = (), allowed: Collection[str] = ()) -> int:
    """Runs the jobs in `directory` that have no result yet, from their checkpoints where there are any; the exit code.

    overrides: of trainer.* and logger.* for these jobs, and of the launcher. allowed: names of code that were typed for
    them, see `compress.config.received`.
    """
    sweep = read(directory)
    check_overrides(chain.from_iterable(sweep.jobs), directory / SWEEP, allowed)
    launcher = list(filter(_is_for_launcher, overrides))
    settings = tuple(override for override in overrides if override not in launcher)
    check_settings(settings, "sweep", " and hydra/launcher=...")
    typed = ("hydra/launcher", "hydra.launcher.") if launcher else ()
    unused = [override for override in sweep.hydra if not key_of(override).startswith((*typed, SEARCH_PATH))]
    sweep = Sweep(directory, sweep.jobs, tuple(launcher), settings)
    compose_jobs([*sweep.jobs[0], *settings, *sweep.hydra])  # whether the launcher is an option
    check_launcher(sweep.hydra)
    data_sets = DataSets()
    jobs = {
        number: job_in(sweep.place(number), sweep.jobs[number], sweep.settings, sweep.hydra, data_sets)
        for number in sweep.missing()
    }
    if unused:
        print(f"note: {directory / SWEEP} has {unused}, which count only where they are typed", file=sys.stderr)
    with _alone(directory):
        return _run(sweep, jobs, data_sets)


def latest(output_directory: Path) -> Path:
    """The sweep with jobs to run that was started last and is not going on."""
    paths = output_directory.glob(f"sweeps/*/{SWEEP}")
    for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, str(path)), reverse=True):
        if read(path.parent).missing() and not _is_running(path.parent):
            return path.parent
    raise UserError(
        f"sweep: found no unfinished sweep in {output_directory}/sweeps; accepted: sweep=DIRECTORY, or "
        "output_directory=... beside sweep=latest"
    )


def check_launcher(overrides: Sequence[str], multirun: bool = True) -> None:
    """Raises UserError where the launcher of a sweep is not installed or is given what it does not take."""
    typed = next(filter(_is_for_launcher, overrides), None)
    if typed and not multirun:
        raise UserError(f"{typed}: found it without -m; accepted: none, or -m before it")
    if not multirun:
        return
    for override in overrides:
        key = key_of(override)
        if any(key == reserved or key.startswith(f"{reserved}.") for reserved in NOT_OF_THE_USER):
            raise UserError(f"{key}: found it for a sweep, whose jobs are expanded and numbered here; accepted: none")
        if is_for_hydra(override) and parse(override).is_sweep_override():
            raise UserError(f"{key}: found several values; accepted: one for the whole sweep")
    with _composed([override for override in overrides if is_for_hydra(override)]) as (config, _):
        launcher, name = _our_launcher(config.hydra.launcher), config.hydra.runtime.choices["hydra/launcher"]
    if launcher is None:
        return
    if find_spec(launcher.library) is None:
        raise UserError(
            f"hydra/launcher: found {name}, which needs {launcher.library}, and that is not installed; "
            f"pip install 'compress[{launcher.library}]'"
        )
    launcher.check()


def _our_launcher(node: DictConfig) -> SeparateLauncher | None:
    """One of `compress.sweeps.launchers`; None where it is Hydra's or that of a plugin."""
    if node._target_ == BASIC_LAUNCHER:  # which Hydra lets nobody but itself call
        return None
    kind = imported(node._target_, "hydra.launcher._target_")
    if not issubclass(kind, SeparateLauncher):
        return None
    launcher: SeparateLauncher = kind(**check_arguments(kind, node, "hydra.launcher"))
    return launcher


@contextmanager
def _composed(overrides: Sequence[str]) -> Iterator[tuple[DictConfig, HydraContext]]:
    """Hydra's own configuration under `overrides`, and what its launchers ask for."""
    register()
    with initialized():
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("run", list(overrides), RunMode.MULTIRUN)
        HydraConfig.instance().set_config(config)
        yield config, HydraContext(config_loader=loader, callbacks=Callbacks(config))


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:  # an OSError, too
        raise UserError(f"sweep: found {directory}, which another process is running; accepted: another one") from None
    except OSError as failure:
        raise UserError(
            f"sweep: found {directory}, where nothing can be written ({failure.strerror}); accepted: a directory of "
            "your own"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _is_running(directory: Path) -> bool:
    try:
        with _alone(directory):
            return False
    except UserError:
        return True


def _run(sweep: Sweep, jobs: Mapping[int, Job], data_sets: DataSets) -> int:
    """Runs the checked `jobs`, by their numbers; returns the exit code of the sweep."""
    done = len(sweep.jobs) - len(jobs)
    if done:
        console.print(f"sweep {sweep.directory}: {done} of {len(sweep.jobs)} jobs are finished", style="bold")
    try:
        if jobs:
            with under_way(sweep.directory / SWEEP, *sweep.words()):
                _launch(sweep, jobs, data_sets)
    finally:
        code = _report(sweep)
    if code:
        console.print(f"run what is missing: {command(*sweep.words())}", markup=False)
    return code


def _launch(sweep: Sweep, jobs: Mapping[int, Job], data_sets: DataSets) -> None:
    directory = sweep.directory.absolute()
    with _composed([*sweep.hydra, hydra_override("hydra.sweep.dir", str(directory))]) as (config, context):
        context.callbacks.on_multirun_start(config=config, config_name="run")
        launcher = _our_launcher(config.hydra.launcher)
        if launcher is not None:
            data_sets.clear()
            calls = [
                Call(sweep.jobs[number], sweep.settings, sweep.hydra, number, directory / str(number), Path.cwd())
                for number in jobs
            ]
            launcher.launch(calls, directory)
        elif config.hydra.launcher._target_ == BASIC_LAUNCHER:
            for number, job in jobs.items():
                console.print(f"job {number}: {escape(varying(sweep.jobs[number], sweep.jobs))}", style="bold")
                perform(job, directory / str(number), number, data_sets)
        else:
            data_sets.clear()
            plugin = Plugins.instance().instantiate_launcher(
                hydra_context=context, task_function=hydra_task, config=config
            )
            words = [[*sweep.jobs[number], *sweep.settings, f"hydra.sweep.subdir={number}"] for number in jobs]
            plugin.launch(words, initial_job_idx=0)
        context.callbacks.on_multirun_end(config=config, config_name="run")


def _report(sweep: Sweep) -> int:
    """Prints the table of all jobs and why some failed, writes the summary, and returns the exit code."""
    outcomes = [outcome(sweep.place(number)) for number in range(len(sweep.jobs))]
    console.print()
    console.print(sweep_table(f"sweep {sweep.directory}", sweep.jobs, outcomes))
    for problem in summarise(sweep.directory):
        print(f"warning: {printable(problem)}", file=sys.stderr)
    for number, ended in enumerate(outcomes):
        if ended.state == "failed":
            console.print(f"job {number} failed: {ended.reason} ({sweep.place(number)}/)", markup=False)
    if (sweep.directory / "summary.csv").exists():
        console.print(f"results in {escape(str(sweep.directory))}/: summary.csv, and a directory per job")
    return exit_code(outcomes)


def read(directory: Path) -> Sweep:
    """The sweep in `directory`. Raises UserError where there is none that can be read."""
    path = directory / SWEEP
    if not path.is_file() and (directory / "config.yaml").is_file():
        raise UserError(f"sweep: found {directory}, the directory of a run; accepted: resume={directory}")
    if not path.is_file():
        raise UserError(f"sweep: found no {path}; accepted: the directory of a sweep")
    try:
        content = yaml_file.load(read_text(path))
        jobs, hydra = content["jobs"], content["hydra"]
        TypeAdapter(list[list[str]]).validate_python([hydra, *jobs], strict=True)
        if not jobs:
            raise ValueError
    except (yaml.YAMLError, ValueError, KeyError, TypeError, OSError):
        raise UserError(f"sweep: found {path}, which cannot be read; accepted: the directory of a sweep") from None
    return Sweep(directory, tuple(map(tuple, jobs)), tuple(hydra))


def _is_for_launcher(override: str) -> bool:
    return key_of(override).startswith(("hydra/launcher", "hydra.launcher."))


def hydra_override(key: str, text: str) -> str:
    """`key=text` in Hydra's grammar, whatever `text` holds."""
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{quoted}'"
