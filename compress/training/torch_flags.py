"""What a Trainer sets for the whole process, and only its training is to see."""

from typing import Any

import pytorch_lightning as pl
import torch


class TorchFlags(pl.Callback):
    """Gives this process back what the Trainer, which is made after this, sets for `deterministic` and `benchmark`."""

    def __init__(self) -> None:
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        self.benchmark = torch.backends.cudnn.benchmark
        self.filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]

    def setup(self, *arguments: Any, **options: Any) -> None:
        # Every new tensor would be filled with NaN, one more kernel for each.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def on_fit_end(self, *arguments: Any) -> None:
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        torch.backends.cudnn.benchmark = self.benchmark
        torch.utils.deterministic.fill_uninitialized_memory = self.filling  # type: ignore[attr-defined]

    def on_exception(self, *arguments: Any) -> None:
        self.on_fit_end()
