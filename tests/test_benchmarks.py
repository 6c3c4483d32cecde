"""The benchmarks run on tiny slices; what they say of speed is not tested."""

import argparse
import csv
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from compress.benchmarks import convergence
from compress.benchmarks.convergence import Point, verdict

ROOT = Path(__file__).parent.parent
FASHION_MNIST = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))


def benchmark(folder, *arguments):
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_steps_of_shampoo_and_sgd_are_compared(tmp_path):
    sizes = ["--batch-size", 8, "--image-size", 8, "--pairs", 2, "--root-interval", 4, "--statistics-interval", 2]
    done = benchmark(tmp_path, "optimizers", "--models", "resnet8", *sizes)
    assert done.returncode == 0, done.stderr
    head, *kinds = done.stdout.splitlines()
    ratio = float(re.search(r"^resnet8, batch 8, .* Shampoo ([\d.]+) times that$", head)[1])
    # Steps 5 to 8: statistics, nothing, statistics, roots.
    weighted = [re.fullmatch(r"  (\d) of 4 steps \((.*)\): ([\d.]+) \(.*\)", line).groups() for line in kinds]
    assert [(count, kind) for count, kind, _ in weighted] == [
        ("2", "statistics, no roots"),
        ("1", "no statistics, no roots"),
        ("1", "no statistics, roots"),
    ]
    assert ratio == pytest.approx(sum(int(count) * float(median) for count, _, median in weighted) / 4, abs=2e-3)


@pytest.mark.fashion_mnist
@pytest.mark.skipif(not FASHION_MNIST.exists(), reason=f"no Fashion-MNIST in {FASHION_MNIST}")
def test_convergence_is_drawn_and_written_down(tmp_path):
    sizes = ["--model", "resnet8", "--image-size", 8, "--limit", 600, "--batch-size", 32, "--steps", 10, "--every", 3]
    chosen = ["--rates", 2, "--seeds", 0, 1, "--intervals", 4, "--shares", 0.8, "--output", "curves"]
    done = benchmark(tmp_path, "convergence", "--root", FASHION_MNIST, *sizes, *chosen)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "curves" / "convergence.csv").open() as stream:
        points = list(csv.DictReader(stream))
    trainings = {}
    for point in points:
        trainings.setdefault((point["optimizer"], point["seed"], point["rate"]), []).append(int(point["step"]))
    assert [steps for (name, *_), steps in trainings.items() if name == "AdamW"] == [[3, 6, 9, 10]] * 3
    assert [steps for (name, *_), steps in trainings.items() if name != "AdamW"] == [[3, 6, 8]] * 3
    assert len(trainings) == 6
    with Image.open(tmp_path / "curves" / "convergence.png") as picture:
        assert picture.width > 500
    assert re.search(r"^Shampoo, interval 4, rate \S+: AdamW's final loss", done.stdout, re.MULTILINE)
    bad = benchmark(tmp_path, "convergence", "--root", FASHION_MNIST, "--shares", 0.8)
    assert bad.returncode == 2
    assert bad.stderr == "error: --shares: found 1 values; accepted: 2\n"


def curve(losses, steps=4, seed=0, name="AdamW"):
    return [Point(name, 0.1, seed, steps, step, loss) for step, loss in enumerate(losses, 1)]


def test_the_share_is_that_of_the_first_step_with_the_final_loss_of_the_same_seed():
    reference = [curve([4, 3, 2, 1.0]), curve([4, 3, 2, 0.5])]
    said = verdict("Shampoo", reference, [curve([2, 1, 0.9], 3), curve([2, 1, 0.5], 3)])
    assert "after 62 % of the steps on average (50 %, 75 %)" in said
    said = verdict("Shampoo", reference, [curve([2, 1, 0.9], 3), curve([2, math.nan, 0.6], 3)])
    assert "not in every seed (50 %, not reached)" in said


def test_rates_are_spaced_evenly_on_a_logarithmic_scale():
    parser = argparse.ArgumentParser()
    convergence.add_arguments(parser)
    first, *others = convergence.contestants(parser.parse_args(["--adamw-rates", "1e-4", "1", "--steps", "100"]))
    assert first.rates == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])
    assert [(each.name, each.steps) for each in others] == [("Shampoo, interval 50", 80), ("Shampoo, interval 20", 75)]
