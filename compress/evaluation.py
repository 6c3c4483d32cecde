"""Accuracy, agreement and latency of a classifier, in float32 whatever it was trained in."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy


@dataclass(frozen=True)
class Evaluation:
    """`accuracy` in 0..1, `per_class` accuracies `(C,)`, and the `logits` `(n, C)` in the loader's order."""

    accuracy: float
    per_class: tuple[float, ...]
    logits: Tensor

    @property
    def predictions(self) -> Tensor:
        """The predicted classes `(n,)`."""
        return self.logits.argmax(dim=1)

    def agreement(self, other: "Evaluation") -> float:
        """The share of images, 0..1, that both give the same class."""
        return (self.predictions == other.predictions).double().mean().item()


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor], Tensor], loader: Iterable[tuple[Tensor, Tensor]], num_classes: int
) -> Evaluation:
    """Runs `model`, a module in eval mode or a plain function, over batches of images `(B, 3, H, W)`, labels `(B,)`.

    Images are handed over on the device they come on. Raises ValueError for a module in training mode.
    """
    if getattr(model, "training", False):
        raise ValueError("a model must be in eval mode to be evaluated")
    batches = [(model(images).cpu(), target.cpu()) for images, target in loader]
    logits = torch.cat([logits for logits, _ in batches])
    target = torch.cat([labels for _, labels in batches])
    predictions = logits.argmax(dim=1)
    per_class = multiclass_accuracy(predictions, target, num_classes, average="none")
    return Evaluation((predictions == target).double().mean().item(), tuple(per_class.tolist()), logits)


def paired_latency_ms(
    models: Sequence[Callable[[Tensor], Any]], input_shape: Sequence[int], batch: int = 1, repeats: int = 50
) -> list[float]:
    """Median milliseconds that each of `models` takes for `(batch, *input_shape)`, on one thread of this process.

    The models take turns, so that whatever else the machine does falls on all of them alike: medians are those of the
    share of each in its turn, times the median turn, as a machine may change its speed within the turns. Each is called
    twice in a turn, and the second call counts, so that none pays for the caches that the others have filled. A model
    that torch does not compute keeps the number of threads that it was read with.
    """
    images = torch.randn(batch, *input_shape, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    turns: list[list[float]] = []
    try:
        with torch.inference_mode():
            for _ in range(repeats + 1):
                turn = []
                for model in models:
                    model(images)
                    started = time.perf_counter()
                    model(images)
                    turn.append(1000 * (time.perf_counter() - started))
                turns.append(turn)
    finally:
        torch.set_num_threads(threads)
    del turns[0]  # which warms up
    typical = statistics.median(map(sum, turns))
    return [typical * statistics.median(turn[number] / sum(turn) for turn in turns) for number in range(len(models))]
