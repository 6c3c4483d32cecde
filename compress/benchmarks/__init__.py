"""What `scripts/benchmark.py` measures; a module has `add_arguments(parser)` and `run(arguments)`."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes, until a GPU has finished its part of it."""
    _wait()
    started = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - started


def spread(ratios: Sequence[float]) -> str:
    """Median and range of the ratios of pairs, as a line."""
    span = f"from {min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs"
    return f"ratio: median {statistics.median(ratios):.2f}, {span}"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
