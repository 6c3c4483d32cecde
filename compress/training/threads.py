"""How many threads a training computes on: a small network is no faster on several.

Threads that have nothing to do spin until the next operation, and beside other jobs they take the cores from those
that do have something to do.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Multiply-accumulates of a batch, forward, that are worth one thread: about 20 ms of work.
MACS_PER_THREAD = 400_000_000


@contextmanager
def threads_for(macs: int) -> Iterator[int]:
    """Within it PyTorch has one thread for each MACS_PER_THREAD of `macs`, the work of a batch, if it has as many.

    Gives their number. It depends on nothing that is measured, so that a resumed run computes on as many threads as
    before. Whoever sets OMP_NUM_THREADS has chosen.
    """
    available = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(available, max(1, macs // MACS_PER_THREAD)))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(available)
