"""All that has to be looked at on a GPU, in one JSON: `python scripts/benchmark.py gpu`.

Distilling a ResNet-18 from a ResNet-50 at 32x32 in every way of `benchmark.py step`, path following through a
ResNet-18, a ResNet-18 trained by `experiment=fast`, and the tests that need a GPU. A part that fails says so and leaves
the others alone; without a GPU there is nothing that it could do, and it says that.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import compress
from compress import models
from compress.benchmarks import seconds, step
from compress.config.compose import compose_jobs
from compress.data.disk_loader import cores
from compress.errors import first_line
from compress.files import write_json
from compress.paths import PACKAGE
from compress.pipeline.parts import Parts
from compress.results.surroundings import surroundings

TESTS, TESTS_SECONDS = "tests/pipeline/test_on_a_gpu.py", 240  # and after how long they are ended
PROCESSES = 12  # of tests
IMAGES = 512  # for path following


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="a file for the figures")
    parser.add_argument("--fashion-mnist", type=Path, default=Path("data"), help="the folder of its four .gz files")


def run(arguments: argparse.Namespace) -> None:
    """Runs each part, prints what it found, and writes it all to `--json`."""
    parts: dict[str, Callable[[], Any]] = {
        "distilling": _distilling,
        "quantization": _quantization,
        "recipe": partial(_recipe, arguments.fashion_mnist.resolve()),
        "tests": _tests,
    }
    done: dict[str, Any] = {}
    not_done: dict[str, str] = {}
    for name, part in parts.items():
        if not torch.cuda.is_available():
            not_done[name] = "found no GPU"
            continue
        try:
            done[name] = part()
        except Exception as failure:  # the others are worth their time all the same
            not_done[name] = f"{type(failure).__name__}: {first_line(failure)}"
        # What is known is kept, should the time be over.
        write_json(arguments.json, {"done": done, "not_done": not_done, **surroundings()})
    for name, reason in not_done.items():
        print(f"{name}: not done, {reason}")
    write_json(arguments.json, {"done": done, "not_done": not_done, **surroundings()})


def _tests() -> dict[str, Any]:
    """How many of the tests marked `gpu` passed, and what was wrong with the others."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rfE", "--tb=line", TESTS]
    if find_spec("xdist"):
        command += ["-n", str(min(cores(), PROCESSES))]
    try:
        ended = subprocess.run(
            command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=TESTS_SECONDS, check=False
        )
        said, code = ended.stdout, ended.returncode
    except subprocess.TimeoutExpired as late:
        said, code = (late.stdout or b"").decode(), None
    lines = said.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    print("\n".join([*failed, *lines[-1:]]))
    return {"exit_code": code, "summary": lines[-1] if lines else "", "failed": failed, "output": lines[-60:]}


def _distilling() -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    options = "--teacher resnet50 --student resnet18 --batch-size 128 --images 12800 --repeats 2"
    return step.measured(parser.parse_args([*options.split(), "--precision", "bf16-mixed", "--accelerator", "gpu"]))


def _quantization() -> dict[str, float]:
    """Seconds of a ResNet-18 of 32x32 pixels with fresh weights, by its bits; one pass before warms up."""
    [job] = compose_jobs(["method=supervised", "data.image_size=32"])
    quantizer = Parts(job.config).quantizer
    assert quantizer is not None  # the default
    torch.manual_seed(0)
    network = models.build("resnet18", 10).eval().cuda()
    batches = [torch.randn(128, 3, 32, 32, device="cuda") for _ in range(IMAGES // 128)]
    quantizer(network, batches, 4)
    times = {f"{bits} bit": seconds(partial(quantizer, network, batches, bits)) for bits in (4, 2)}
    times["2 bits/weight"] = seconds(lambda: quantizer.at_rates(network, batches)(2.0))
    print(f"path following through a ResNet-18, {IMAGES} images: {times}")
    return times


def _recipe(fashion_mnist: Path) -> dict[str, Any]:
    """What a ResNet-18 makes of Fashion-MNIST by `experiment=fast`, and how long the whole run took."""
    typed = ["experiment=fast", "student=resnet18", f"data.root={fashion_mnist}", "trainer.accelerator=gpu"]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = compress.run([*typed, "quantizer=none", "export=none", f"hydra.run.dir={folder}/run"])
        elapsed = time.perf_counter() - started
    assert result is not None  # of a run that is no process of another
    row = result.rows[0]
    accuracies = {"validation": 100 * row.accuracy_on("validation"), "test": 100 * row.accuracy_on("test")}
    print(f"a ResNet-18 by experiment=fast: {accuracies} % after {elapsed:.0f} s")
    return {**accuracies, "seconds": elapsed, "epochs": result.record.student.epochs}
