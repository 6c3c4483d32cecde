"""A test process, and what it starts, computes on one core: most networks here are too small for more."""

import os

# Before anything imports PyTorch, which reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
