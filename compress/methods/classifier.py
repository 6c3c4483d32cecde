"""What all methods share: one network is trained, validated and checkpointed as `model`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from compress.optim.schedules import Schedule

OptimizerFactory = Callable[..., Optimizer]


class Classifier(pl.LightningModule, ABC):
    """A LightningModule around one classifier `(B, 3, H, W) -> (B, C)`.

    A method says in `losses` what is minimised. Loss terms are buffered on the device and logged once an epoch,
    each as `train/<name>`, because a call of `self.log` in every step costs more than a small network's step.
    """

    def __init__(
        self,
        student: nn.Module,
        loss: Callable[..., dict[str, Tensor]],
        optimizer: OptimizerFactory,
        scheduler: Schedule,
        num_classes: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = student
        self.loss = loss
        self.optimizer_factory = optimizer
        self.schedule = scheduler
        self.seed = seed
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.validation_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.validation_loss: list[Tensor] = []
        self.train_terms: dict[str, list[Tensor]] = {}

    @abstractmethod
    def losses(self, images: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits `(B, C)` and the weighted loss terms by name, whose sum is minimised."""

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def on_train_epoch_start(self) -> None:
        # Dropout draws from the global generator: seeding it by epoch makes a resumed run draw the same masks.
        torch.manual_seed(1_000_003 * self.seed + self.current_epoch)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        images, target = batch
        logits, terms = self.losses(images, target)
        total = torch.stack(list(terms.values())).sum()
        self.train_accuracy.update(logits.detach(), target)
        for name, value in (terms | {"loss": total}).items():
            self.train_terms.setdefault(name, []).append(value.detach())
        return total

    def on_train_epoch_end(self) -> None:
        for name, values in self.train_terms.items():
            self.log(f"train/{name}", torch.stack(values).mean(), sync_dist=True)
        self.log("train/accuracy", self.train_accuracy)
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        self.train_terms = {}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        images, target = batch
        logits = self(images).float()
        self.validation_accuracy.update(logits, target)
        self.validation_loss.append(nn.functional.cross_entropy(logits, target, reduction="none"))

    def on_validation_epoch_end(self) -> None:
        self.log("val/accuracy", self.validation_accuracy)
        self.log("val/loss", torch.cat(self.validation_loss).mean(), sync_dist=True)
        self.validation_loss = []

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optimizer_factory(self.model.parameters())
        epochs = self.trainer.max_epochs
        steps_per_epoch = int(self.trainer.estimated_stepping_batches) // epochs
        schedule = self.schedule(optimizer, max(steps_per_epoch, 1), epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
