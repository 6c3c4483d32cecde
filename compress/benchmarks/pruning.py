"""Inference with half of the channels against all of them: `python scripts/benchmark.py pruning`."""

import argparse

import torch
from torch import Tensor, nn

from compress import models
from compress.benchmarks import seconds, spread
from compress.pruning.structured import Structured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet18", choices=models.available())
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the channels that go")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shape = (3, arguments.image_size, arguments.image_size)
    dense = models.build(arguments.model, 10).eval()
    small = Structured(ratio=arguments.ratio).shrink(models.build(arguments.model, 10), shape).eval()
    parameters = [models.count_parameters(network) for network in (small, dense)]
    macs = [models.count_macs(network, shape) for network in (small, dense)]
    for name, (left, whole) in {"parameters": parameters, "MACs": macs}.items():
        print(f"{name}: {left:,} of {whole:,}, {left / whole:.3f}")
    for batch in arguments.batch_sizes:
        images = torch.randn(batch, *shape)
        for network in (dense, small):
            _seconds(network, images)
        ratios = [_seconds(dense, images) / _seconds(small, images) for _ in range(arguments.pairs)]
        print(f"batch {batch}, {arguments.threads} thread{'s' * (arguments.threads > 1)}: {spread(ratios)}")


def _seconds(network: nn.Module, images: Tensor) -> float:
    """The shorter of two inferences."""
    with torch.inference_mode():
        return min(seconds(lambda: network(images)) for _ in range(2))
