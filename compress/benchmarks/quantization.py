"""A whole pass of post-training quantization against what it cannot do without: `scripts/benchmark.py quantization`.

The floor is two forward passes over the calibration images, and the multiplications and additions of the Grams, of the
path following and of its refinement at the rate of a large product of two matrices on this machine.
"""

import argparse
import copy
import statistics
from functools import partial

import torch
from torch import Tensor, nn

from compress import models
from compress.benchmarks import seconds, spread
from compress.quantization import quantize
from compress.quantization.calibration import walk
from compress.quantization.patches import live_columns, row_count
from compress.quantization.preparation import Prepared, prepare
from compress.quantization.refinement import Refinement

SIDE = 3000  # of the matrices that the rate is measured with


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet18", choices=models.available())
    parser.add_argument("--images", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--candidates", type=int, default=1, help="scales that are tried for each channel")
    parser.add_argument("--sweeps", type=int, default=0, help="of coordinate descent")
    parser.add_argument("--pairs", type=int, default=3)


def run(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = models.build(arguments.model, 10).eval().to(device)
    refinement = Refinement(arguments.candidates, arguments.sweeps, refit=arguments.sweeps > 0)
    for count in arguments.images:
        shape = (count, 3, arguments.image_size, arguments.image_size)
        images = list(torch.randn(shape, device=device).split(128))
        prepared = prepare(network, images)
        operations = floor_operations(prepared, images, refinement)
        quantization = partial(quantize, network, images, arguments.bits, refinement=refinement)
        passes = partial(_forward, prepared.analog, images)
        _, *pairs = [  # the first one warms up
            (seconds(quantization), operations / gemm_rate(device), 2 * seconds(passes))
            for _ in range(arguments.pairs + 1)
        ]
        total, products, passes = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"{arguments.model}, {count} images of {arguments.image_size}x{arguments.image_size}, {device}, "
            f"{torch.get_num_threads()} threads: {total:.2f} s; floor {passes:.2f} s of forward passes and "
            f"{products:.2f} s of products"
        )
        print(spread([total / (products + passes) for total, products, passes in pairs]))


def floor_operations(prepared: Prepared, images: list[Tensor], refinement: Refinement) -> float:
    """Multiplications and additions of all layers' Grams, path following and refinement.

    With d columns that see an input, n patches and N rows in a group, the symmetric Gram takes d^2 n and the cross Gram
    2 d^2 n. Path following takes d^2 N for what the weights before are to give, which candidate scales share, and for
    each candidate d^2 N for what its codes undo, and where there are several, as much for its error (the Gram is
    symmetric) and 2 d^2 N in all for the products of the weights with the cross Gram. Coordinate descent needs these
    too, 2 d^2 N for those of the codes with the Gram, and 2 d^2 N a sweep for what it changes.
    """
    total, first = 0, True

    def add(name: str, inputs: list[Tensor], _: list[Tensor]) -> None:
        nonlocal total, first
        layer = prepared.analog.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)  # the networks of conf/model have no others
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        live = live_columns(layer, inputs[0])
        depth = layer.weight[0].numel() if live is None else len(live)
        patches = sum(row_count(layer, batch) for batch in inputs)
        rows = layer.weight.shape[0] // groups
        grams = depth**2 * patches * (1 if first else 3)
        compared, descended = refinement.scale_candidates > 1, refinement.sweeps > 0
        products = 1 + refinement.scale_candidates * (1 + compared) + 2 * (compared or descended)
        products += 2 * descended + 2 * refinement.sweeps
        total += groups * (grams + products * depth**2 * rows)
        first = False

    walk(prepared.analog, copy.deepcopy(prepared.analog), prepared.graph, images, prepared.order, add)
    return total


def gemm_rate(device: torch.device) -> float:
    """Operations per second of a product of two square float32 matrices, the median of five."""
    first, second = torch.randn(2, SIDE, SIDE, device=device)
    times = [seconds(lambda: first @ second) for _ in range(5)]
    return 2 * SIDE**3 / statistics.median(times)


@torch.no_grad()
def _forward(network: nn.Module, images: list[Tensor]) -> None:
    for batch in images:
        network(batch)
