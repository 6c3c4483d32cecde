"""Distil, prune and quantize image classifiers: the most accuracy per byte, and the file."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

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
