"""The benchmarks run on tiny slices; what they say of speed is not tested."""

import argparse
import csv
import json
import math
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import compress
from compress.benchmarks import convergence, quantization, timm_families, torchdistill
from compress.benchmarks.convergence import Point, verdict
from compress.quantization.preparation import prepare
from compress.quantization.refinement import Refinement

ROOT = Path(__file__).parents[2]
FASHION_MNIST = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))


@pytest.fixture
def run_benchmark(tmp_path, monkeypatch, capsys):
    """Runs the script with some arguments, in an empty folder, and gives its exit code, output and errors."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
        code, threads = 0, torch.get_num_threads()
        try:
            runpy.run_path(str(ROOT / "scripts" / "benchmark.py"), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        finally:
            # What one thread computes differs in its last bits, and other tests compare whole runs.
            torch.set_num_threads(threads)
        return code, *capsys.readouterr()

    return run


@pytest.mark.slow
def test_half_of_the_channels_are_compared_with_all(run_benchmark):
    sizes = ["--model", "resnet8", "--image-size", 8, "--batch-sizes", 1, 2, "--pairs", 2]
    code, output, _ = run_benchmark("pruning", *sizes)
    assert code == 0
    parameters, macs, *speeds = output.splitlines()
    assert float(parameters.rpartition(" ")[2]) < 0.27
    assert float(macs.rpartition(" ")[2]) < 0.27
    assert [line.partition(",")[0] for line in speeds] == ["batch 1", "batch 2"]
    assert all("2 pairs" in line for line in speeds)


@pytest.mark.slow
def test_a_packed_file_is_smaller_than_its_codes_in_one_width(run_benchmark):
    code, output, _ = run_benchmark("files", "--models", "resnet8", "--bits", 4, 8, "--rounds", 1)
    assert code == 0
    _, *lines = output.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["resnet8, 4", "resnet8, 8"]
    for line in lines:
        total, dense, _, entropy = (int(number.replace(",", "")) for number in re.findall(r"\d+,\d+", line))
        assert entropy < total < dense + 5000


@pytest.mark.slow
def test_steps_of_shampoo_and_sgd_are_compared(run_benchmark):
    sizes = ["--batch-size", 8, "--image-size", 8, "--pairs", 2, "--root-interval", 4, "--statistics-interval", 2]
    code, output, _ = run_benchmark("optimizers", "--models", "resnet8", *sizes)
    assert code == 0
    head, *kinds = output.splitlines()
    ratio = float(re.search(r"^resnet8, batch 8, .* Shampoo ([\d.]+) times that$", head)[1])
    # Steps 5 to 8: statistics, nothing, statistics, roots.
    weighted = [re.fullmatch(r"  (\d) of 4 steps \((.*)\): ([\d.]+) \(.*\)", line).groups() for line in kinds]
    assert [(count, kind) for count, kind, _ in weighted] == [
        ("2", "statistics, no roots"),
        ("1", "no statistics, no roots"),
        ("1", "no statistics, roots"),
    ]
    assert ratio == pytest.approx(sum(int(count) * float(median) for count, _, median in weighted) / 4, abs=2e-3)


@pytest.mark.slow
@pytest.mark.fashion_mnist
@pytest.mark.skipif(not FASHION_MNIST.exists(), reason=f"no Fashion-MNIST in {FASHION_MNIST}")
def test_convergence_is_drawn_and_written_down(run_benchmark, tmp_path):
    sizes = ["--model", "resnet8", "--image-size", 8, "--limit", 600, "--batch-size", 32, "--steps", 10, "--every", 3]
    chosen = ["--rates", 2, "--seeds", 0, 1, "--intervals", 4, "--shares", 0.8, "--output", "curves"]
    code, output, _ = run_benchmark("convergence", "--root", FASHION_MNIST, *sizes, *chosen)
    assert code == 0
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
    assert re.search(r"^Shampoo, interval 4, rate \S+: AdamW's final loss", output, re.MULTILINE)


@pytest.mark.fashion_mnist
@pytest.mark.skipif(not FASHION_MNIST.exists(), reason=f"no Fashion-MNIST in {FASHION_MNIST}")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shares", 0.8], "--shares: found 1 values; accepted: 2"),
        (["--root", FASHION_MNIST, "--limit", 5], "data.limit: found 5"),
    ],
)
def test_a_mistake_is_one_line(run_benchmark, tmp_path, arguments, words):
    code, _, errors = run_benchmark("convergence", *arguments)
    assert code == 2
    assert errors.count("\n") == 1
    assert errors.startswith(f"error: {words}")
    assert not list(tmp_path.iterdir())


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


@pytest.mark.slow
def test_the_solver_in_grams_gives_the_codes_of_the_definition(run_benchmark):
    code, output, _ = run_benchmark("solver", "--columns", 700, "--rows", 8, "--samples", 900, "--pairs", 2)
    assert code == 0
    sizes, speeds, ratio = output.splitlines()
    assert sizes == "d 700, N 8, m 900, 3 bit, one thread"
    # Both compute in float32, where a value between two codes may fall to either side.
    assert float(re.search(r"equal codes ([\d.]+) %", speeds)[1]) > 99
    assert re.fullmatch(r"ratio: median [\d.]+, from [\d.]+ to [\d.]+, 2 pairs", ratio)


@pytest.mark.slow
def test_the_floor_of_a_pass_counts_the_products_of_every_layer(run_benchmark):
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 6, 1, groups=2), nn.Flatten(), nn.Linear(24, 5)
    )
    images = [torch.zeros(2, 3, 4, 4)]
    resized_rgb = prepare(network, images)
    # (groups, columns, patches, rows of a group), and the first layer's inputs are the same in both networks.
    shapes = [(1, 27, 8, 4), (2, 2, 8, 3), (1, 24, 2, 5)]
    plain = sum(g * d * d * (n * (1 if d == 27 else 3) + 2 * rows) for g, d, n, rows in shapes)
    assert quantization.floor_operations(resized_rgb, images, Refinement()) == plain
    refined = quantization.floor_operations(resized_rgb, images, Refinement(12, 4, refit=True))
    assert refined - plain == sum(g * d * d * rows * (2 * 12 + 1 - 2 + 2 + 2 + 4 * 2) for g, d, _, rows in shapes)
    code, output, _ = run_benchmark(
        "quantization", "--model", "resnet8", "--images", 8, "--image-size", 8, "--pairs", 1
    )
    assert code == 0
    assert re.match(r"resnet8, 8 images of 8x8, \w+, \d+ threads: [\d.]+ s; floor [\d.]+ s of forward", output)


def test_the_table_of_timms_families_counts_what_is_near_enough(run_benchmark, tmp_path):
    families = pytest.importorskip("timm").list_modules()
    near = {"name": "some", "size": 64, "by": "rtn", "error": 0.04, "weights": 0.96, "onnx": 1e-4, "why": ""}
    rows = [near | {"family": family} for family in families]
    rows[0] |= {"error": 0.06}
    rows[1] |= {"weights": 0.9, "why": "lstm is a LSTM"}
    rows[2] |= {"onnx": 2e-3}
    rows[3] = {"family": families[3], "name": None, "size": None}
    (tmp_path / "measured.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    code, *_ = run_benchmark("timm_families", tmp_path / "table.md", "--measured", tmp_path / "measured.jsonl")
    table = (tmp_path / "table.md").read_text()
    count = len(families)
    assert code == 0
    assert f"{count - 3} of {count} are quantized" in table
    assert f"and {count - 2} are\nexported" in table
    assert f"| {families[1]} | some | 64 | 90.0% | rtn | 4.0e-02 | 1.0e-04 | lstm is a LSTM |" in table


@pytest.mark.slow
def test_a_network_of_timm_is_quantized_and_exported():
    pytest.importorskip("timm")
    row = timm_families._measured("test_resnet", 64)
    assert row["error"] < 0.05
    assert (row["weights"], row["why"]) == (1.0, "")
    assert row["onnx"] < 1e-3


@pytest.mark.slow
def test_steps_are_timed_in_every_way(run_benchmark, tmp_path):
    networks = ["--teacher", "resnet8", "--student", "resnet8", "--batch-size", 32]
    code, output, _ = run_benchmark("step", *networks, "--images", 128, "--repeats", 1, "--json", "step.json")
    assert code == 0
    figures = json.loads((tmp_path / "step.json").read_text())
    ways = ["peer", "live", "bare live", "cached", "student", "bare student", "torchdistill"]
    assert list(figures["images_per_second"]) == ways
    assert all(f"  {way}: {speed:,.0f} images/s" in output for way, speed in figures["images_per_second"].items())
    assert all(len(times) == 1 and times[0] > 0 for times in figures["seconds"].values())
    assert figures["ratios"]["cached / peer"] == figures["seconds"]["peer"][0] / figures["seconds"]["cached"][0]
    assert {"hardware", "versions", "options"} < set(figures)


@pytest.mark.slow
def test_some_ways_of_a_step_take_turns_alone(run_benchmark, tmp_path, monkeypatch):
    networks = ["--teacher", "resnet8", "--student", "resnet8", "--batch-size", 32, "--images", 128, "--repeats", 1]
    code, output, _ = run_benchmark("step", *networks, "--ways", "student", "cached", "--json", "step.json")
    assert code == 0
    figures = json.loads((tmp_path / "step.json").read_text())
    assert list(figures["seconds"]) == ["cached", "student"]
    assert list(figures["ratios"]) == ["cached / student"]
    assert figures["options"]["ways"] == ["student", "cached"]
    assert "bare" not in output
    monkeypatch.setattr(torchdistill, "installed", lambda: False)
    code, _, errors = run_benchmark("step", *networks, "--ways", "torchdistill")
    found = "error: --ways: found torchdistill, which is not installed; accepted after: pip install torchdistill\n"
    assert (code, errors) == (2, found)


@pytest.mark.slow
def test_rates_are_timed_beside_a_width(run_benchmark, tmp_path):
    trained = ["method=supervised", "student=resnet8_narrow", "data.limit=300", "trainer.max_epochs=1"]
    done = compress.run([*trained, "quantizer=none", "trainer.accelerator=cpu", f"output_directory={tmp_path / 'run'}"])
    options = ["--rates", 2, 1, "--images", 64, "--repeats", 1]
    code, output, errors = run_benchmark("rates", done.directory, *options)
    assert (code, errors) == (0, "")
    assert "64 images, times a pass to 2 bits" in output
    ratios = dict(re.findall(r"^  (.*): ratio: median ([\d.]+)", output, re.MULTILINE))
    assert list(ratios) == ["2 bits/weight", "1 bits/weight", "all, each"]
    assert all(float(ratio) > 0 for ratio in ratios.values())


def test_without_a_gpu_it_is_said_what_could_not_be_done(run_benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, output, _ = run_benchmark("gpu")
    assert code == 0
    parts = ["distilling", "quantization", "recipe", "tests"]
    assert output.splitlines() == [f"{name}: not done, found no GPU" for name in parts]
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert (figures["done"], list(figures["not_done"])) == ({}, parts)
