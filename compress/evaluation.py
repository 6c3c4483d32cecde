"""Accuracy, agreement and latency of a classifier, in float32 whatever it was trained in."""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy


@dataclass(frozen=True)
class Evaluation:
    """`accuracy` in 0..1, `per_class` accuracies `(C,)`, and the predicted classes `(n,)` in the loader's order."""

    accuracy: float
    per_class: tuple[float, ...]
    predictions: Tensor

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
    batches = [(model(images).argmax(dim=1).cpu(), target.cpu()) for images, target in loader]
    predictions = torch.cat([prediction for prediction, _ in batches])
    target = torch.cat([labels for _, labels in batches])
    per_class = multiclass_accuracy(predictions, target, num_classes, average="none")
    return Evaluation((predictions == target).double().mean().item(), tuple(per_class.tolist()), predictions)


@torch.no_grad()
def latency_ms(model: nn.Module, input_shape: tuple[int, int, int], repeats: int = 20) -> float:
    """Median time of one image `(C, H, W)` in milliseconds, eval mode, on one thread where it runs on the CPU."""
    device = next(model.parameters()).device
    image = torch.zeros(1, *input_shape, device=device)
    threads = torch.get_num_threads()
    times = []
    model.eval()
    torch.set_num_threads(1)
    try:
        for _ in range(repeats + 3):
            start = time.perf_counter()
            model(image).cpu()
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return 1000 * statistics.median(times[3:])
