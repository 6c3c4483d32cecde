"""What SIGINT and SIGTERM do: they end the process at once, and say in one line how to go on.

Everything a run needs to go on is on the disk at the end of every epoch, so that a signal has nothing to save: at most
the running epoch is lost, as it would be by `kill -9`.
"""

import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from compress.paths import search_words

# The commands that go on with what this process does, a sweep, its job, a stage of it, each with the file they need.
_under_way: list[tuple[str, Path]] = []
# The signal that `stoppable` was told of.
_stops: list["StoppedError"] = []


class StoppedError(BaseException):
    """SIGINT or SIGTERM; no KeyboardInterrupt, which Lightning would turn into an exit of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number
        self.reason = f"stopped by {signal.Signals(number).name}"
        self.go_on = _go_on()

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
        for handled in numbers:
            signal.signal(handled, signal.SIG_DFL)
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


def command(*overrides: str) -> str:
    """What to type to go on with a run or a sweep, `overrides` being `resume=DIRECTORY` or `sweep=DIRECTORY` first."""
    return shlex.join(["python", "scripts/run.py", *overrides, *search_words()])


@contextmanager
def under_way(needed: Path, *overrides: str) -> Iterator[None]:
    """A signal or failure within says that the `command` of `overrides` goes on, or that of something around it.

    Only once the file `needed` is there; before, nothing has been done that could go on.
    """
    _under_way.append((command(*overrides), needed))
    try:
        yield
    except Exception as failure:
        go_on = _go_on()
        if go_on is not None:
            failure.go_on = go_on  # type: ignore[attr-defined]  # read in `compress.errors`
        raise
    finally:
        _under_way.pop()


def _go_on() -> str | None:
    return next((command for command, needed in _under_way if needed.exists()), None)


def raise_if_stopped() -> None:
    """Raises the StoppedError that was raised before and lost.

    A library of native code that is called just then, such as safetensors or Ray, says that it failed itself, or
    nothing at all. Whoever goes on after any exception asks here first.
    """
    if _stops:
        raise _stops[0] from None
