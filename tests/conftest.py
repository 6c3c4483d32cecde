"""A test process, and what it starts, computes on one core: most networks here are too small for more."""

import gc
import os

# Before anything imports PyTorch, which reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Libraries make a million objects that stay; the collector would look through all of them again and again.
gc.set_threshold(20_000)


def pytest_collection_finish():
    gc.freeze()
