"""Stopping and going on: which run to continue, who owns a run directory, and what a signal leaves behind.

Everything a run needs to go on is on the disk at the end of every epoch, so that a signal has nothing to save: it ends
the process at once, and at most the running epoch is lost, as it would be by `kill -9`.
"""

import fcntl
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from compress.errors import UserError
from compress.files import remove_leftovers

STARTED = "started.json"
# What to type beside `python scripts/run.py` to go on with what this process does: a sweep, its job, a stage of it.
_under_way: list[str] = []
# The signal that `stoppable` was told of.
_stops: list["StoppedError"] = []


class OwnedError(UserError):
    """Another process works on the run."""


class StoppedError(BaseException):
    """SIGINT or SIGTERM; no KeyboardInterrupt, which Lightning would turn into an exit of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number
        self.reason = f"stopped by {signal.Signals(number).name}"
        self.go_on = _under_way[0] if _under_way else None

    def __str__(self) -> str:
        return f"{self.reason}; to go on: {self.go_on}" if self.go_on else self.reason


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM raise StoppedError in here, once: a second signal ends the process on the spot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        _stops.append(StoppedError(number))
        raise _stops[0]

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except Exception:
        raise_if_stopped()
        raise
    finally:
        _stops.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def under_way(go_on: str) -> Iterator[None]:
    """A signal within says that `go_on` continues, unless that of something around it does."""
    _under_way.append(go_on)
    try:
        yield
    finally:
        _under_way.remove(go_on)


def raise_if_stopped() -> None:
    """Raises the StoppedError that was raised before and lost.

    A library of native code that is called just then, such as safetensors or Ray, says that it failed itself, or
    nothing at all. Whoever goes on after any exception asks here first.
    """
    if _stops:
        raise _stops[0] from None


@contextmanager
def owned(directory: Path) -> Iterator[None]:
    """This process alone writes to `directory`; the unfinished files of one that was killed there are removed.

    Raises OwnedError where another process has it. The lock is the kernel's and ends with the process, however it ends.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        if not _lock(handle):
            raise OwnedError(f"resume: found {directory}, where a run is going on; accepted: one that was interrupted")
        for folder in (directory, directory / "checkpoints", directory / "models"):
            remove_leftovers(folder)
        with under_way(f"resume={directory}"):
            yield
    finally:
        os.close(handle)


def latest(output_directory: Path) -> Path:
    """The directory of the unfinished run, alone or in a sweep, that was started last and is not going on."""
    found = [
        path.parent
        for pattern in ("runs/*/config.yaml", "sweeps/*/*/config.yaml")
        for path in output_directory.glob(pattern)
    ]
    for directory in sorted(found, key=_start, reverse=True):
        if not (directory / "result.json").exists() and not _is_owned(directory):
            return directory
    raise UserError(
        f"resume: found no unfinished run in {output_directory}/runs or {output_directory}/sweeps; "
        "accepted: resume=DIRECTORY, or output_directory=... beside resume=latest"
    )


def requeued(output_directory: Path, overrides: Sequence[str]) -> Path | None:
    """The unfinished run that the same command began in the same SLURM job before that was requeued."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    typed = [override for override in overrides if not override.startswith("hydra.")]
    directories = {path.parent for path in output_directory.glob(f"runs/*/{STARTED}")}
    named = [override.partition("=")[2] for override in overrides if override.startswith("hydra.run.dir=")]
    for directory in sorted(map(Path, named)) or sorted(directories, key=_start, reverse=True):
        try:
            started = json.loads((directory / STARTED).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if started.get("slurm_job") == job and started["overrides"] == typed and (directory / "config.yaml").exists():
            return directory
    return None


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
