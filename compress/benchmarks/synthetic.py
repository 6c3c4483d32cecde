"""Run directories with invented figures, in the form of real ones: to time the report on, and to test it at scale."""

import math
import random
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from compress.files import write_text
from compress.results.record import Record
from compress.results.tradeoff import Row, write_tradeoff

STUDENTS = {"resnet8": 78_042, "resnet20": 272_474, "resnet56": 855_770, "resnet18": 11_173_962}
METHODS = ("supervised", "kd", "dkd", "at", "dml")
LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)


def write_runs(folder: Path, count: int, epochs: int = 60, layers: int = 20) -> list[Path]:
    """Writes `count` run directories below `folder`: all methods and students, five learning rates, seeds 0 to 4.

    The same arguments give the same figures. A model file holds a few bytes only.
    """
    return [_write_run(folder / str(index), index, epochs, layers) for index in range(count)]


def _write_run(directory: Path, index: int, epochs: int, layers: int) -> Path:
    draw = random.Random(index)
    variations = list(product(LEARNING_RATES, STUDENTS, METHODS, range(5)))
    rate, student, method, seed = variations[index % len(variations)]
    best = 0.8 + 0.03 * list(STUDENTS).index(student) + draw.gauss(0, 0.004)
    rows = [_row(32, STUDENTS[student], best)]
    rows += [_row(bits, STUDENTS[student], best - draw.uniform(0.5, 1) * 2.0 ** (-bits)) for bits in (8, 4, 3, 2)]
    overrides = ["experiment=fashion_mnist_resnet20", f"method={method}", f"student={student}"]
    about = {
        "overrides": [*overrides, f"seed={seed}", f"optimizer.lr={rate}"],
        "started": f"2026-01-{1 + index // 24 % 28:02}T{index % 24:02}:00:00+00:00",
        "seed": seed,
        "seconds": {"data": 0.5, "teacher": 1.0, "student": draw.uniform(60, 600), "quantization": 8.0},
        "data": {"name": "FashionMNIST", "images": {"train": 51_000, "validation": 9_000, "test": 10_000}},
        "teacher": None,
        "student": {"model": student, "parameters": STUDENTS[student], "epochs": epochs, "best_epoch": epochs - 1},
        "rows": rows,
        "layers": {Path(row.file).name: {"quantized": _layers(draw, row, layers), "skipped": {}} for row in rows[1:]},
    }
    for row in rows:
        write_text(directory / row.file, "invented")
    Record.model_validate(about).write(directory)
    write_text(directory / "config.yaml", yaml.safe_dump(_config(method, student, rate, seed, epochs), sort_keys=False))
    write_tradeoff(directory / "tradeoff.csv", rows)
    write_text(directory / "metrics.csv", _metrics(draw, best, rate, epochs))
    return directory


def _layers(draw: random.Random, row: Row, count: int) -> dict[str, dict[str, Any]]:
    names = ["conv1", *(f"layer{1 + number // 6}.{number % 6}.conv1" for number in range(count - 2)), "fc"]
    return {
        name: {"bits": 8 if name in ("conv1", "fc") else row.bits, "error": draw.uniform(0.5, 1) / 2**row.bits}
        for name in names
    }


def _metrics(draw: random.Random, best: float, rate: float, epochs: int) -> str:
    """A `metrics.csv` whose accuracy approaches `best`, 0..1."""
    lines = ["step,epoch,train/accuracy,train/learning_rate,train/loss,val/accuracy,val/loss"]
    for epoch in range(epochs):
        accuracy = best * (1 - math.exp(-4 * (epoch + 1) / epochs)) + draw.gauss(0, 0.003)
        loss = 2.3 * math.exp(-3 * (epoch + 1) / epochs)
        lines.append(f"{100 * epoch + 99},{epoch},{accuracy},{rate},{loss},{accuracy - 0.02},{1.1 * loss}")
    return "\n".join(lines) + "\n"


def _row(bits: int, parameters: int, accuracy: float) -> Row:
    """That of the float32 student, where `bits` is 32, or of one on grids."""
    size, float32 = parameters * bits // 8 + 7_000, bits == 32
    return Row(
        quantizer="none" if float32 else "gpfq",
        bits=bits,
        levels=None if float32 else 2**bits,
        first_last_bits=None if float32 else 8,
        activation_bits=32,
        runtime="torch",
        sparsity=0.0,
        validation_accuracy=accuracy - 0.01,
        test_accuracy=accuracy,
        agreement=1.0 if float32 else 1 - 0.3 * 2.0 ** (-bits),
        runtime_agreement=None,
        logit_difference=None,
        bytes=size,
        ratio=(parameters * 4 + 7_000) / size,
        latency_ms=0.5,
        latency_32_ms=9.0,
        file=f"models/student-{'fp32' if float32 else f'gpfq-{bits}bit'}.safetensors",
    )


def _config(method: str, student: str, rate: float, seed: int, epochs: int) -> dict[str, Any]:
    """As long as a real one: of the keys only those that differ and those that are shown are real."""
    return {
        "seed": seed,
        "output_directory": "outputs",
        "data": {"_target_": "compress.data.fashion_mnist.FashionMNIST", "root": "data", "limit": None},
        "student": {"_target_": "compress.models.cifar_resnet.CifarResNet", "stem": student},
        "method": {"stem": method},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": rate, "betas": [0.9, 0.999]},
        "trainer": {"max_epochs": epochs, "log_every": 0},
        "logger": {"csv": {"_target_": "compress.results.metrics_csv.MetricsCSV"}},
        "others": {f"key_{number}": {"value": number, "list": [0.1, 0.2]} for number in range(30)},
    }
