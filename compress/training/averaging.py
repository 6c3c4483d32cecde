"""The exponential moving average of the weights, which is what is validated, kept and exported."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor

from compress.models import masks


class MovingAverage(WeightAveraging):
    """`trainer.ema_decay`: after each batch with a step, average = decay average + (1 - decay) weight.

    Statistics of BatchNorm are averaged too; masks and counters are those of the network that is trained, and what a
    mask has just taken away is gone from the average at once.
    """

    def __init__(self, decay: float) -> None:
        def average(so_far: Tensor, now: Tensor, count: Tensor) -> Tensor:
            return so_far.lerp(now, 1 - decay) if so_far.is_floating_point() else now

        super().__init__(avg_fn=average)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *batch)
        if self._average_model is not None:
            masks.apply(self._average_model.module)
