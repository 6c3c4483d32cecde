"""Packed files, their bytes and the time to write and read them: `python scripts/benchmark.py files`.

Beside the file stands what all codes would take in each of the three encodings alone. Reading builds the network, draws
its weights and traces it, whatever the file holds; what is left of it is for the codes.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from compress import models
from compress.benchmarks import seconds
from compress.export.description import NetworkDescription
from compress.export.encodings import ENCODINGS, encoded_bytes
from compress.export.packed import read_model, write_packed
from compress.models.canonical import canonical
from compress.quantization import quantize
from compress.quantization.refinement import Refinement

CLASSES, SHAPE = 10, (3, 32, 32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet18"], choices=models.available())
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)


def run(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("model, bits: bytes of the file; of all codes " + ", ".join(ENCODINGS) + "; write s, read s, its building s")
    for stem in arguments.models:
        network = models.build(stem, CLASSES).eval()
        for bits in arguments.bits:
            print(f"{stem}, {bits}: {measure(network, stem, bits, arguments.rounds)}")


def measure(network: torch.nn.Module, stem: str, bits: int, rounds: int) -> str:
    """The line of one network at one width; medians of `rounds` in which writing, reading and building take turns."""
    images = torch.randn(16, *SHAPE)
    quantized = quantize(network, [images], bits, refinement=Refinement())
    architecture = {"stem": stem, "options": {}, "num_classes": CLASSES}
    description = NetworkDescription(architecture, [str(index) for index in range(CLASSES)], [0.5], [0.25], SHAPE)
    sizes = [encoded_bytes(layer) for layer in quantized.layers.values()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        steps: list[Callable[[], object]] = [
            partial(write_packed, path, quantized, description),
            partial(read_model, path),
            lambda: canonical(models.rebuild(architecture), SHAPE),
        ]
        times = [[seconds(step) for step in steps] for _ in range(rounds + 1)][1:]  # the first one warms up
        total = path.stat().st_size
    alone = ", ".join(f"{sum(size[each] for size in sizes):,}" for each in ENCODINGS)
    return f"{total:,}; {alone}; " + ", ".join(
        f"{statistics.median(column):.2f}" for column in zip(*times, strict=True)
    )
