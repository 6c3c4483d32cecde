"""Networks at rates against one at a fixed width: `python scripts/benchmark.py rates RUN`.

The float32 network of a finished RUN is quantized with the default options: to a width, to each rate alone, and to all
rates one after the other, which share what does not depend on the rate. One thread computes, and its own seconds count.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from compress.arguments import build
from compress.benchmarks import spread
from compress.benchmarks.peer_comparison import IMAGES, opened
from compress.config.compose import compose_jobs
from compress.quantization import Quantizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument("--rates", type=float, nargs="+", default=[3, 2, 1.4, 1, 0.7, 0.5], help="bits of a weight")
    parser.add_argument("--bits", type=int, default=2, help="the width")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--repeats", type=int, default=3)


def run(arguments: argparse.Namespace) -> None:
    """Prints how many times as long as the width each rate takes alone, and how many times all of them take each."""
    torch.set_num_threads(1)
    _, network, images = opened(arguments.run_directory)
    images = images[: arguments.images]
    batches = images.split(128)
    [job] = compose_jobs(["method=supervised", "quantizer=gpfq"])
    quantizer: Quantizer = build(job.config.quantizer, "quantizer", Quantizer)

    def at(rates: Sequence[float]) -> list[float]:
        quantize = quantizer.at_rates(network, batches)
        return [quantize(rate).rate for rate in rates]

    ways = {f"{rate:g} bits/weight": [rate] for rate in arguments.rates} | {"all, each": arguments.rates}
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.repeats):
        width = _seconds(lambda: quantizer(network, batches, arguments.bits))
        for name, rates in ways.items():
            ratios[name].append(_seconds(partial(at, rates)) / len(rates) / width)
    print(f"{arguments.run_directory}, {len(images)} images, times a pass to {arguments.bits} bits ({width:.1f} s)")
    for name, pairs in ratios.items():
        print(f"  {name}: {spread(pairs)}")


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started
