"""Going on: which run to continue, and who owns a run directory."""

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from compress import models
from compress.config.compose import Job, is_for_hydra, parse
from compress.config.received import allowed_targets
from compress.errors import UserError
from compress.files import (
    check_can_be_made,
    is_leftover,
    make_chosen,
    make_directory,
    read_json,
    remove_leftovers,
    write_json,
)
from compress.paths import CONF
from compress.stopping import under_way
from compress.training.processes import node_rank

STARTED = "started.json"


class OwnedError(UserError):
    """Another process works on the run."""


@contextmanager
def owned(directory: Path, words: Sequence[str] = ()) -> Iterator[None]:
    """This process alone writes to `directory`; the unfinished files of one that was killed there are removed.

    `words` are what has to be typed beside `resume=` to go on.
    Raises OwnedError where another process has it. The lock is the kernel's and ends with the process, however it ends.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        if not _lock(handle):
            raise OwnedError(f"resume: found {directory}, where a run is going on; accepted: one that was interrupted")
        for folder in (directory, directory / "checkpoints", directory / "models"):
            remove_leftovers(folder)
        with under_way(directory / "config.yaml", f"resume={directory}", *words):
            yield
    finally:
        os.close(handle)


def latest(output_directory: Path) -> Path:
    """The directory of the unfinished run, alone or in a sweep, that was started last and is not going on."""
    begun = [
        path.parent
        for pattern in ("runs/*/config.yaml", "sweeps/*/*/config.yaml")
        for path in output_directory.glob(pattern)
    ]
    for directory in sorted(begun, key=_start, reverse=True):
        if not (directory / "result.json").exists() and not _is_owned(directory):
            return directory
    raise UserError(
        f"resume: found no unfinished run in {output_directory}/runs or {output_directory}/sweeps; "
        "accepted: resume=DIRECTORY, or output_directory=... beside resume=latest"
    )


def chosen(
    overrides: Sequence[str], key: str = "resume", latest: Callable[[Path], Path] = latest
) -> tuple[Path, frozenset[str], list[str]]:
    """The directory that `resume=` or `sweep=` means, the names that `allow_targets=` has, and the other overrides."""
    allowed, overrides = allowed_targets(overrides)
    value = next(override for override in overrides if override.startswith(f"{key}=")).removeprefix(f"{key}=")
    # The folders of the user's options are searched already.
    others = [override for override in overrides if not override.startswith((f"{key}=", "hydra.searchpath="))]
    if value != "latest":
        return Path(value), allowed, others
    elsewhere = [override for override in others if override.startswith("output_directory=")]
    default = OmegaConf.load(CONF / "run.yaml").output_directory
    output_directory = Path(elsewhere[-1].partition("=")[2] if elsewhere else default)
    return latest(output_directory), allowed, [override for override in others if override not in elsewhere]


def requeued(output_directory: Path, overrides: Sequence[str]) -> Path | None:
    """The unfinished run that the same command began in the same SLURM job before that was requeued."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    typed = [override for override in overrides if not is_for_hydra(override)]
    directories = {path.parent for path in output_directory.glob(f"runs/*/{STARTED}")}
    named = [str(parse(override).value()) for override in overrides if override.startswith("hydra.run.dir=")]
    for directory in sorted(map(Path, named)) or sorted(directories, key=_start, reverse=True):
        begun = started(directory) or {}
        if begun.get("slurm_job") == job and begun["overrides"] == typed and (directory / "config.yaml").exists():
            return directory
    return None


def started(directory: Path) -> dict[str, Any] | None:
    """What `record_start` has left of the unfinished run in `directory`; None where nothing can be read."""
    try:
        content = read_json(directory / STARTED, "a run that was begun")
        datetime.fromisoformat(content["started"])
        if not all(isinstance(word, str) for word in content["overrides"]):
            return None
        return {key: content[key] for key in ("overrides", "started", "slurm_job") if key in content}
    except (UserError, KeyError, TypeError, ValueError):
        return None


def record_start(directory: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """What was typed and when, on the disk until the run is finished so that a resumed run can still say it."""
    path = directory / STARTED
    if not (directory / "config.yaml").exists() or not path.exists():
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        slurm_job = os.environ.get("SLURM_JOB_ID")
        content = {"overrides": list(overrides), "started": now}
        write_json(path, content | ({"slurm_job": slurm_job} if slurm_job else {}))
    begun = started(directory)
    if begun is None:
        raise UserError(
            f"resume: found {path}, which cannot be read; accepted: to remove it, and the run goes on without it"
        )
    return begun


def _start(directory: Path) -> tuple[int, str]:
    path = directory / STARTED
    return (path if path.exists() else directory / "config.yaml").stat().st_mtime_ns, str(directory)


def _is_owned(directory: Path) -> bool:
    handle = os.open(directory, os.O_RDONLY)
    try:
        return not _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks on directories cannot say.
        return True
    return True


def run_directory(job: Job, overrides: Sequence[str]) -> Path:
    """A directory for one run: the one in `hydra.run.dir` if that was typed, or one made just now.

    Raises UserError for one that is not empty, and where several machines were given none to meet in.
    """
    network = models.label(job.config.student)
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{job.config.method.stem}-{network}".replace("/", "-")
    return directory_for("run", job, overrides, name)


def _is_only_begun(directory: Path, configuration: str) -> bool:
    """Whether `directory` holds no more than a command leaves that was killed before it had written `configuration`.

    It cannot be continued then, and the command can be given again.
    """
    if (directory / configuration).exists():
        return False
    # A run has files before its configuration, those of its stages among them; a sweep begins with it.
    before = (STARTED, "run.log", "config.yaml") if configuration == "config.yaml" else ()
    return all(is_leftover(path) or path.name in before for path in directory.rglob("*") if not path.is_dir())


def check_place(kind: Literal["run", "sweep"], job: Job, overrides: Sequence[str]) -> None:
    """Raises UserError where the directory of a run or sweep can never be made; `job` need not be checked yet."""
    key = f"hydra.{kind}.dir"
    typed = _typed(key, overrides)
    if typed:
        check_can_be_made(Path(str(typed[-1])), key)
    else:
        check_can_be_made(Path(str(job.config.get("output_directory"))) / f"{kind}s", "output_directory")


def _typed(key: str, overrides: Sequence[str]) -> list[Any]:
    return [parse(override).value() for override in overrides if override.startswith(f"{key}=")]


def directory_for(kind: Literal["run", "sweep"], job: Job, overrides: Sequence[str], name: str) -> Path:
    """The directory that `overrides` name for a run or a sweep, or `name` in that for all of them, made just now."""
    key = f"hydra.{kind}.dir"
    typed = _typed(key, overrides)
    # Every machine runs the command, and they have to meet in one directory.
    if job.config.trainer.get("num_nodes", 1) > 1 and not typed:
        raise UserError(f"{key}: found none for several machines; accepted: one directory for all of them")
    if not typed:
        return make_directory(Path(job.config.output_directory) / f"{kind}s", name)
    directory = Path(str(typed[-1]))
    if node_rank(job.config.trainer) > 0:
        return directory
    if directory.is_dir() and not _is_only_begun(directory, "sweep.yaml" if kind == "sweep" else "config.yaml"):
        go_on = "sweep" if kind == "sweep" else "resume"
        raise UserError(
            f"{key}: found {directory}, which is not empty; accepted: a new directory, or {go_on}={directory}"
        )
    make_chosen(directory, key)
    return directory
