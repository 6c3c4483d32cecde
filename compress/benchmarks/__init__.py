"""What `scripts/benchmark.py` measures; a module has `add_arguments(parser)` and `run(arguments)`."""

import statistics
from collections.abc import Sequence


def spread(ratios: Sequence[float]) -> str:
    """Median and range of the ratios of pairs, as a line."""
    span = f"from {min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs"
    return f"ratio: median {statistics.median(ratios):.2f}, {span}"
