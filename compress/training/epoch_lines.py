"""One line per epoch anywhere, and a bar on a terminal."""

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from rich.progress import Progress

from compress.progress import bar, console


def is_validated(trainer: pl.Trainer) -> bool:
    """Whether the epoch of `trainer` is one that ends with a validation."""
    return (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0


class EpochLines(Checkpoint):
    """One line per `every` epochs; `every = 0` prints none.

    It is a `Checkpoint` because Lightning calls those after the module has logged its epoch, and all others before.
    """

    def __init__(self, label: str, every: int = 1) -> None:
        self.label = label
        self.every = every
        self.progress: Progress | None = None
        self.started = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.perf_counter()
        self.progress = bar()
        epoch = f"{self.label} epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self.progress.add_task(epoch, total=trainer.num_training_batches)
        self.progress.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if self.progress is not None:
            self.progress.advance(self.progress.task_ids[0])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()
        epoch = trainer.current_epoch + 1
        if self.every == 0 or (epoch % self.every and epoch != trainer.max_epochs):
            return
        metrics = trainer.callback_metrics
        validation = f"  validation {100 * metrics['val/accuracy']:.1f} %" if is_validated(trainer) else ""
        console.print(
            f"  {self.label} epoch {epoch:>{len(str(trainer.max_epochs))}}/{trainer.max_epochs}"
            f"  loss {metrics['train/loss']:.3f}"
            f"  train {100 * metrics['train/accuracy']:.1f} %"
            f"{validation}"
            f"  {time.perf_counter() - self.started:.1f} s"
        )

    def on_exception(self, trainer: pl.Trainer, *arguments: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
