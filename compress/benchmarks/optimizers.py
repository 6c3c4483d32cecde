"""A whole training step with Shampoo against one with SGD: `python scripts/benchmark.py optimizers`."""

import argparse
import statistics

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from compress import models
from compress.benchmarks import seconds
from compress.optim.shampoo import Shampoo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet18"], choices=models.available())
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--root-interval", type=int, default=50)
    parser.add_argument("--statistics-interval", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=10, help="of one step with each optimizer, for each kind of step")
    parser.add_argument("--image-size", type=int, default=32)


def run(arguments: argparse.Namespace) -> None:
    for name in arguments.models:
        print(compared(name, arguments))


def compared(name: str, arguments: argparse.Namespace) -> str:
    """Forward pass, backward pass and update of `name`, SGD and Shampoo in turn, as a line with the ratio.

    Of an interval's steps those that do the same count as one kind, of which `--pairs` are measured; the ratio is the
    mean of the kinds' medians over the interval.
    """
    shampoo, sgd = (_Training(name, arguments, optimizer) for optimizer in ("shampoo", "sgd"))
    for warm_up in (sgd, shampoo, sgd, shampoo):
        warm_up.step()
    interval, every = arguments.root_interval, arguments.statistics_interval
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for count in range(interval + 1, 2 * interval + 1):
        kinds.setdefault(((count - 1) % every == 0, count % interval == 0), []).append(count)
    ratio, spent, words = 0.0, [], []
    for (learns, roots), counts in kinds.items():
        pairs = [(sgd.step(), shampoo.step(number=counts[0])) for _ in range(arguments.pairs)]
        ratios = [slow / fast for fast, slow in pairs]
        ratio += statistics.median(ratios) * len(counts) / interval
        spent += [fast for fast, _ in pairs]
        kind = f"{'statistics' if learns else 'no statistics'}, {'roots' if roots else 'no roots'}"
        span = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        words.append(f"  {len(counts)} of {interval} steps ({kind}): {span}")
    head = f"{name}, batch {arguments.batch_size}, {shampoo.device}, {torch.get_num_threads()} threads: "
    head += f"SGD {1000 * statistics.median(spent):,.1f} ms a step, Shampoo {ratio:.3f} times that"
    return "\n".join([head, *words])


class _Training:
    """A network, an optimizer and one batch."""

    def __init__(self, name: str, arguments: argparse.Namespace, optimizer: str) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        network = models.build(name, 10).to(self.device).to(memory_format=torch.channels_last)
        images = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size)
        self.images = images.to(self.device, memory_format=torch.channels_last)
        self.target = torch.randint(10, (arguments.batch_size,)).to(self.device)
        self.network = network.train()
        self.optimizer: Optimizer
        if optimizer == "sgd":
            self.optimizer = SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True)
        else:
            intervals = {name: getattr(arguments, name) for name in ("root_interval", "statistics_interval")}
            self.optimizer = Shampoo(network.parameters(), lr=1e-4, weight_decay=5e-4, **intervals)

    def step(self, number: int | None = None) -> float:
        """Seconds of a training step, which is that of this `number` to an optimizer that counts."""
        for state in self.optimizer.state.values():
            if number is not None:
                state["step"].fill_(number - 1)
        return seconds(self._step)

    def _step(self) -> None:
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.network(self.images), self.target).backward()
        self.optimizer.step()
