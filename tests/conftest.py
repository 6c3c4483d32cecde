"""A test process, and what it starts, computes on one core: most networks here are too small for more."""

import gc
import os
import sys

import absl.logging

# Before anything imports PyTorch, which reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Libraries make a million objects that stay; the collector would look through all of them again and again.
gc.set_threshold(20_000)
# OpenVINO and TensorBoard import it. It keeps the standard error of that moment, a file of pytest's, and closes it once
# Hydra sets up its logging while a test has another.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__


def pytest_collection_finish():
    gc.freeze()
