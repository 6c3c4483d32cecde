"""Steps that Shampoo needs for a tuned AdamW's validation loss: `python scripts/benchmark.py convergence`.

On Fashion-MNIST. Every optimizer has the same warm-up and cosine over the steps it is given, and is tuned over the
same number of learning rates with the first seed; the rate with the lowest final loss is then used for all seeds.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from compress import models
from compress.arguments import plain
from compress.data.dataset import EpochSampler
from compress.data.fashion_mnist import FashionMNIST
from compress.errors import UserError
from compress.files import write_atomically, write_csv
from compress.optim.groups import optimizer_factory
from compress.optim.schedules import Cosine
from compress.paths import CONF
from compress.training.fit import device

WARM_UP = 0.1  # of the steps


@dataclass(frozen=True)
class Point:
    """Validation loss (cross entropy) after `step` steps of one training, of `steps` in all."""

    optimizer: str
    rate: float
    seed: int
    steps: int
    step: int
    loss: float


@dataclass(frozen=True)
class Contestant:
    """An optimizer, its learning rates and the number of steps it is given."""

    name: str
    build: Callable[..., Optimizer]
    rates: tuple[float, ...]
    steps: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", default="data", help="folder of the four .gz files of Fashion-MNIST")
    parser.add_argument("--output", type=Path, default=Path("outputs/convergence"))
    parser.add_argument("--model", default="resnet20", choices=models.available())
    parser.add_argument("--limit", type=int, default=20_000, help="training images, a tenth of them for validation")
    parser.add_argument("--image-size", type=int, default=28)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=280, help="of AdamW")
    parser.add_argument("--every", type=int, default=14, help="steps between two validations")
    parser.add_argument("--intervals", type=int, nargs="+", default=[50, 20], help="of Shampoo's roots")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.75], help="of the steps, per interval")
    parser.add_argument("--adamw-rates", type=float, nargs=2, default=[1e-3, 3e-2], help="lowest and highest")
    parser.add_argument("--shampoo-rates", type=float, nargs=2, default=[1e-4, 3e-3], help="lowest and highest")
    parser.add_argument("--rates", type=int, default=5, help="of each optimizer, evenly spaced on a logarithmic scale")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])


def run(arguments: argparse.Namespace) -> None:
    if len(arguments.shares) != len(arguments.intervals):
        raise UserError(f"--shares: found {len(arguments.shares)} values; accepted: {len(arguments.intervals)}")
    data = FashionMNIST(
        arguments.root,
        image_size=arguments.image_size,
        batch_size=arguments.batch_size,
        evaluation_batch_size=500,
        limit=arguments.limit,
        crop_padding=2,
        horizontal_flip=True,
        device=device("auto"),
    )
    data.prepare_data()
    data.setup()
    points: list[Point] = []
    tuned = {contestant.name: _tuned(contestant, data, arguments, points) for contestant in contestants(arguments)}
    path = arguments.output / "convergence.csv"
    write_csv(path, [field.name for field in fields(Point)], map(asdict, points))
    _draw(path.with_suffix(".png"), tuned)
    reference, *others = tuned
    for name in others:
        print(verdict(name, tuned[reference], tuned[name]))
    print(f"curves in {path} and {path.with_suffix('.png')}")


def contestants(arguments: argparse.Namespace) -> list[Contestant]:
    """AdamW, then Shampoo with each interval."""

    def spaced(lowest: float, highest: float) -> tuple[float, ...]:
        return tuple(torch.logspace(math.log10(lowest), math.log10(highest), arguments.rates).tolist())

    optimizers = [Contestant("AdamW", _builder("adamw"), spaced(*arguments.adamw_rates), arguments.steps)]
    for interval, share in zip(arguments.intervals, arguments.shares, strict=True):
        build, steps = _builder("shampoo", root_interval=interval), max(1, math.floor(share * arguments.steps))
        optimizers.append(Contestant(f"Shampoo, interval {interval}", build, spaced(*arguments.shampoo_rates), steps))
    return optimizers


def _builder(stem: str, **options: Any) -> Callable[..., Optimizer]:
    """Of the optimizer in `conf/optimizer` with that name, all options but these and the learning rate as there."""
    node = plain(OmegaConf.load(CONF / "optimizer" / f"{stem}.yaml"), resolve=False)
    return lambda parameters, lr: optimizer_factory(node | options | {"lr": lr})(parameters)


def train(
    contestant: Contestant, rate: float, seed: int, data: FashionMNIST, arguments: argparse.Namespace
) -> list[Point]:
    """The validation losses of one training."""
    torch.manual_seed(seed)
    network = models.build(arguments.model, data.num_classes).to(data.device).to(memory_format=torch.channels_last)
    optimizer = contestant.build(network.parameters(), rate)
    schedule = Cosine(warmup_epochs=WARM_UP * contestant.steps)(optimizer, 1, contestant.steps)
    data.seed = seed
    points = []
    for step, (images, target) in enumerate(islice(_batches(data.train_dataloader()), contestant.steps), 1):
        network.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), target).backward()
        optimizer.step()
        schedule.step()
        if step % arguments.every == 0 or step == contestant.steps:
            loss = validation_loss(network, data.val_dataloader())
            points.append(Point(contestant.name, rate, seed, contestant.steps, step, loss))
    return points


def _batches(loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Those of one epoch after the other, without end."""
    assert isinstance(loader.sampler, EpochSampler)
    for epoch in count():
        loader.sampler.set_epoch(epoch)
        yield from loader


@torch.no_grad()
def validation_loss(network: nn.Module, loader: DataLoader[Any]) -> float:
    network.eval()
    losses = [nn.functional.cross_entropy(network(images), target, reduction="none") for images, target in loader]
    return torch.cat(losses).mean().item()


def verdict(name: str, reference: list[list[Point]], tried: list[list[Point]]) -> str:
    """How far the trainings `tried` came by when they had the final loss of the `reference` of their seed."""
    shares = []
    for curve, [*_, goal] in zip(tried, reference, strict=True):
        reached = next((point.step for point in curve if point.loss <= goal.loss), math.inf)
        shares.append(reached / goal.step)
    by_seed = ", ".join("not reached" if share == math.inf else f"{100 * share:.0f} %" for share in shares)
    mean = statistics.mean(shares)
    when = "not in every seed" if mean == math.inf else f"after {100 * mean:.0f} % of the steps on average"
    ends = [
        f"{statistics.mean(run[-1].loss for run in runs):.4f} after {runs[0][-1].step}" for runs in (tried, reference)
    ]
    return (
        f"{name}, rate {tried[0][-1].rate:.2g}: AdamW's final loss (rate {reference[0][-1].rate:.2g}) {when} "
        f"({by_seed}); final losses {ends[0]} steps and {ends[1]}"
    )


def _tuned(
    contestant: Contestant, data: FashionMNIST, arguments: argparse.Namespace, points: list[Point]
) -> list[list[Point]]:
    """The trainings of all seeds with the best rate; those of all rates are added to `points`."""
    first, *seeds = arguments.seeds
    runs = [train(contestant, rate, first, data, arguments) for rate in contestant.rates]
    for run in runs:
        print(f"{contestant.name}, rate {run[-1].rate:.2g}: final loss {run[-1].loss:.4f}", flush=True)
    # A diverged training has a loss that is not a number, and compares with nothing.
    best = min(runs, key=lambda run: run[-1].loss if math.isfinite(run[-1].loss) else math.inf)
    others = [train(contestant, best[-1].rate, seed, data, arguments) for seed in seeds]
    points += [point for run in (*runs, *others) for point in run]
    return [best, *others]


def _draw(path: Path, tuned: dict[str, list[list[Point]]]) -> None:
    """Mean and range over the seeds of the validation loss, by steps."""
    figure = Figure(figsize=(7.5, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, runs in tuned.items():
        steps = [point.step for point in runs[0]]
        losses = [[run[index].loss for run in runs] for index in range(len(steps))]
        [line] = axes.plot(steps, list(map(statistics.mean, losses)), label=f"{name}, {runs[0][0].rate:.2g}")
        lowest, highest = list(map(min, losses)), list(map(max, losses))
        axes.fill_between(steps, lowest, highest, color=line.get_color(), alpha=0.15)
    axes.axhline(statistics.mean(run[-1].loss for run in tuned["AdamW"]), color="0.6", linewidth=1, linestyle="--")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss (logarithmic)")
    axes.set_title("mean and range of the seeds; optimizer, tuned learning rate", fontsize=10)
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8)
    write_atomically(path, figure.savefig)
