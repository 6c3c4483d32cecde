"""A test process, and what it starts, computes on one core: most networks here are too small for more."""

import builtins
import gc
import os
import sys
from contextlib import suppress

import pytest

from compress.errors import COLLECT_AFTER

# Before anything imports PyTorch, which reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.set_threshold(COLLECT_AFTER)
# TensorBoard and others import absl, where they are installed. It keeps the standard error of that moment, a file of
# pytest's, and closes it once Hydra sets up its logging while a test has another.
with suppress(ImportError):
    import absl.logging

    absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture
def uninstall(monkeypatch):
    """A function that takes the name of a package, which from then on cannot be imported."""
    imports = builtins.__import__

    def take_away(package):
        def without(name, *arguments, **options):
            if name.partition(".")[0] == package:
                raise ImportError(name)
            return imports(name, *arguments, **options)

        monkeypatch.setattr(builtins, "__import__", without)

    return take_away


def pytest_collection_finish():
    gc.freeze()
