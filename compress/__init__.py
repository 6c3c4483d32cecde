"""Distil, prune and quantize image classifiers: the most accuracy per byte, and the file."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

# PyTorch's threads read this when PyTorch is imported. They wait awake for their next operation, a thirtieth as long as
# they would by themselves: enough within a training step, and beside other jobs it does not keep cores from them.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if TYPE_CHECKING:
    from compress.pipeline.run import Result


def run(overrides: Sequence[str] = ()) -> "Result":
    """Does one run from Python as the command line would: `compress.run(["method=dkd", "student=resnet18"])`.

    Paths such as `output_directory` are relative to the working directory. Raises `compress.errors.UserError` for a
    mistake in `overrides` before anything is written.
    """
    from compress.cli import run_directory
    from compress.pipeline import stages
    from compress.pipeline.checks import checked_jobs

    [(typed, composed)] = checked_jobs(overrides)
    return stages.run(composed, run_directory(composed), typed)
