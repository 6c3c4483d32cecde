"""A sweep: every job is run, by whatever launcher, one that fails ends no other, and what is missing can be run later.

Its directory holds `sweep.yaml` (the jobs and who runs them), a numbered directory per job, and `summary.csv`.
"""

import gc
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from filelock import FileLock, Timeout
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from hydra.utils import get_class
from omegaconf import DictConfig
from pydantic import TypeAdapter
from rich.markup import escape

from compress.arguments import check_arguments
from compress.config import compose as configuration
from compress.config.compose import compose_jobs
from compress.errors import UserError
from compress.files import write_text
from compress.pipeline import checks, stages
from compress.pipeline.checks import checked_jobs
from compress.pipeline.resume import OwnedError
from compress.progress import console
from compress.stopping import raise_if_stopped, under_way
from compress.sweeps.launchers.separate import SeparateLauncher
from compress.sweeps.outcomes import FAILED, exit_code, outcome, record_failure, summarise, sweep_table
from compress.training import processes

SWEEP = "sweep.yaml"
# What a sweep decides itself: jobs are expanded before they are checked, and lie in numbered directories.
NOT_OF_THE_USER = ("hydra/sweeper", "hydra.sweeper", "hydra.sweep.subdir", "hydra.job.num")
PLACE = ("hydra.sweep.dir", "hydra.mode")


@dataclass(frozen=True)
class Sweep:
    """`jobs`: the overrides of each, its number being its place; `hydra`: those for Hydra itself, the launcher's."""

    directory: Path
    jobs: tuple[tuple[str, ...], ...]
    hydra: tuple[str, ...]

    def place(self, number: int) -> Path:
        return self.directory / str(number)


def start(directory: Path, jobs: Sequence[Sequence[str]], overrides: Sequence[str]) -> int:
    """Runs the composed and checked `jobs` of the command line `overrides` in a new `directory`; the exit code."""
    jobs = tuple(tuple(each for each in job if not is_for_hydra(each)) for job in jobs)
    hydra = tuple(each for each in overrides if is_for_hydra(each) and _key(each) not in PLACE)
    sweep = Sweep(directory, jobs, hydra)
    content = {"hydra": list(hydra), "jobs": [list(job) for job in jobs]}
    write_text(directory / SWEEP, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000))
    with _alone(directory):
        return _run(sweep)


def resume(directory: Path, overrides: Sequence[str] = ()) -> int:
    """Runs the jobs in `directory` that have no result yet, from their checkpoints where there are any; the exit code.

    overrides: of trainer.* and logger.* for these jobs, and of the launcher.
    """
    sweep = _read(directory)
    launcher = [each for each in overrides if _key(each).startswith(("hydra/launcher", "hydra.launcher."))]
    settings = [each for each in overrides if each not in launcher]
    for override in settings:
        if not override.startswith(("trainer.", "logger.")) or "=" not in override:
            raise UserError(
                f"{override}: a resumed sweep keeps its configuration; accepted: trainer.*=..., logger.*=... and "
                "hydra/launcher=..."
            )
    hydra = sweep.hydra
    if any(_key(each) == "hydra/launcher" for each in launcher):
        hydra = tuple(each for each in hydra if not _key(each).startswith(("hydra/launcher", "hydra.launcher.")))
    sweep = Sweep(directory, sweep.jobs, (*hydra, *launcher))
    compose_jobs([*sweep.jobs[0], *settings, *sweep.hydra])
    check_launcher(sweep.hydra)
    for number in _missing(sweep):
        checked_jobs([*sweep.jobs[number], *settings])
    with _alone(directory):
        return _run(sweep, settings)


def latest(output_directory: Path) -> Path:
    """The sweep with jobs to run that was started last and is not going on."""
    found = output_directory.glob(f"sweeps/*/{SWEEP}")
    for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, str(path)), reverse=True):
        if _missing(_read(path.parent)) and not _is_running(path.parent):
            return path.parent
    raise UserError(
        f"sweep: found no unfinished sweep in {output_directory}/sweeps; accepted: sweep=DIRECTORY, or "
        "output_directory=... beside sweep=latest"
    )


def job(config: DictConfig) -> None:
    """What Hydra calls for each job, in this process or another: a run whose failure stays in its directory."""
    hydra = HydraConfig.get()
    directory = Path(hydra.runtime.output_dir)
    first = processes.node_rank(config.trainer) == 0
    if first:
        (directory / FAILED).unlink(missing_ok=True)
    try:
        configuration.add_stems(config, hydra.runtime.choices)
        checks.check_values(config)
        stages.run(config, directory, list(hydra.overrides.task))
    except OwnedError:
        # A job of a launcher may outlive the process that started it.
        print(f"{directory}: another process is running this job; it is left alone", file=sys.stderr)
    except Exception as failure:
        raise_if_stopped()
        mistake = isinstance(failure, UserError)
        if mistake:
            print(f"error: {failure}", file=sys.stderr)
        else:
            traceback.print_exc()
        if first:
            record_failure(directory, failure, "" if mistake else traceback.format_exc())
    finally:
        # Networks, trainers and loops know each other, so that nothing but the collector frees them.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_for_hydra(override: str) -> bool:
    return _key(override).startswith(("hydra.", "hydra/"))


def check_launcher(overrides: Sequence[str], multirun: bool = True) -> None:
    """Raises UserError where the launcher of a sweep is not installed or is given what it does not take."""
    typed = next((each for each in overrides if _key(each).startswith(("hydra/launcher", "hydra.launcher"))), None)
    if typed and not multirun:
        raise UserError(f"{typed}: found it without -m; accepted: none, or -m before it")
    if not multirun:
        return
    for override in overrides:
        key = _key(override)
        if any(key == each or key.startswith(f"{each}.") for each in NOT_OF_THE_USER):
            raise UserError(f"{key}: found it for a sweep, whose jobs are expanded and numbered here; accepted: none")
        if is_for_hydra(override) and OverridesParser.create().parse_override(override).is_sweep_override():
            raise UserError(f"{key}: found several values; accepted: one for the whole sweep")
    with _composed([each for each in overrides if is_for_hydra(each)]) as (config, _):
        launcher = _own_launcher(config.hydra.launcher)
    if launcher is None:
        return
    if find_spec(launcher.library) is None:
        raise UserError(
            f"hydra/launcher: found {typed.partition('=')[2]}, which needs {launcher.library}, and that is not "
            f"installed; pip install 'compress[{launcher.library}]'"
        )
    launcher.check()


def _own_launcher(node: DictConfig) -> SeparateLauncher | None:
    """One of `compress.sweeps.launchers`; None where it is Hydra's or that of a plugin."""
    try:
        kind = get_class(node._target_)
    except (ImportError, ValueError, AttributeError):
        raise UserError(
            f"hydra.launcher._target_: found {node._target_!r}, which cannot be imported; accepted: see --help"
        ) from None
    own = issubclass(kind, SeparateLauncher)
    return kind(**check_arguments(kind, node, "hydra.launcher")) if own else None


@contextmanager
def _composed(overrides: Sequence[str]) -> Iterator[tuple[DictConfig, HydraContext]]:
    """Hydra's own configuration under `overrides`, and what its launchers ask for."""
    configuration.register()
    with configuration.initialize():
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


def _run(sweep: Sweep, settings: Sequence[str] = ()) -> int:
    missing = _missing(sweep)
    done = len(sweep.jobs) - len(missing)
    if done:
        console.print(f"sweep {sweep.directory}: {done} of {len(sweep.jobs)} jobs are finished", style="bold")
    jobs = [[*sweep.jobs[number], *settings, f"hydra.sweep.subdir={number}"] for number in missing]
    try:
        if jobs:
            with under_way(f"sweep={sweep.directory}"):
                _launch(sweep, jobs)
    finally:
        code = _report(sweep)
    if code:
        console.print(f"run what is missing: python scripts/run.py sweep={sweep.directory}", markup=False)
    return code


def _launch(sweep: Sweep, jobs: Sequence[Sequence[str]]) -> None:
    place = hydra_override("hydra.sweep.dir", str(sweep.directory.absolute()))
    with _composed([*sweep.hydra, place]) as (config, context):
        context.callbacks.on_multirun_start(config=config, config_name="run")
        parts = {"hydra_context": context, "task_function": job, "config": config}
        launcher = _own_launcher(config.hydra.launcher)
        if launcher is None:
            launcher = Plugins.instance().instantiate_launcher(**parts)
        else:
            launcher.setup(**parts)
        launcher.launch(jobs, initial_job_idx=0)
        context.callbacks.on_multirun_end(config=config, config_name="run")


def _report(sweep: Sweep) -> int:
    """Prints the table of all jobs and why some failed, writes the summary, and returns the exit code."""
    outcomes = [outcome(sweep.place(number)) for number in range(len(sweep.jobs))]
    console.print()
    console.print(sweep_table(f"sweep {sweep.directory}", sweep.jobs, outcomes))
    for problem in summarise(sweep.directory):
        print(f"warning: {problem}", file=sys.stderr)
    for number, ended in enumerate(outcomes):
        if ended.state == "failed":
            console.print(f"job {number} failed: {ended.reason} ({sweep.place(number)}/)", markup=False)
    if (sweep.directory / "summary.csv").exists():
        console.print(f"results in {escape(str(sweep.directory))}/: summary.csv, and a directory per job")
    return exit_code(outcomes)


def _missing(sweep: Sweep) -> list[int]:
    return [number for number in range(len(sweep.jobs)) if outcome(sweep.place(number)).state != "finished"]


def _read(directory: Path) -> Sweep:
    path = directory / SWEEP
    if not path.is_file() and (directory / "config.yaml").is_file():
        raise UserError(f"sweep: found {directory}, the directory of a run; accepted: resume={directory}")
    if not path.is_file():
        raise UserError(f"sweep: found no {path}; accepted: the directory of a sweep")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        jobs, hydra = content["jobs"], content["hydra"]
        TypeAdapter(list[list[str]]).validate_python([hydra, *jobs], strict=True)
        if not jobs:
            raise ValueError
    except (yaml.YAMLError, ValueError, KeyError, TypeError, OSError):
        raise UserError(f"sweep: found {path}, which cannot be read; accepted: the directory of a sweep") from None
    return Sweep(directory, tuple(tuple(each) for each in jobs), tuple(hydra))


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def hydra_override(key: str, text: str) -> str:
    """`key=text` in Hydra's grammar, whatever `text` holds."""
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{quoted}'"
