"""`scripts/report.py` on runs with invented figures: `python scripts/benchmark.py report`."""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from compress.benchmarks import seconds
from compress.benchmarks.synthetic import write_runs
from compress.report.formats import write_reports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=60)


def run(arguments: argparse.Namespace) -> None:
    """The report of many runs with invented figures, in each format."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        write_runs(runs / "runs", arguments.runs, arguments.epochs)
        for name in ("report.html", "report.md", "report.csv"):
            taken = seconds(partial(write_reports, [runs / "runs"], [runs / name]))
            size = (runs / name).stat().st_size
            print(f"{name} of {arguments.runs} runs of {arguments.epochs} epochs: {taken:.1f} s, {size / 1e6:.1f} MB")
