"""The Lightning callback that keeps pruned weights at zero and prunes when the recipe says so."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from torch import nn

from compress.export.state_dicts import CHANNELS
from compress.models import masks
from compress.pruning.recipe import MaskRecipe


class Pruning(pl.Callback):
    """Masks for the `networks` of a module, which get them here; `recipe` None: those that they have are kept as is.

    Weights are set to zero after each step of any optimizer, so that neither momentum nor decay can bring one back,
    and no other network ever sees one, whoever calls the optimizers. The masks are saved with the networks: a resumed
    run reads them and prunes on from there. So are the channels of the `architectures` of networks that were shrunk.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        recipe: MaskRecipe | None = None,
        architectures: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.networks = networks
        self.recipe = recipe
        self.architectures = architectures or {}
        if recipe is not None:
            for network in networks.values():
                masks.attach(network, recipe.pruned_layers(network))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *arguments: self._apply())
        if trainer.global_step == 0:
            self._prune(trainer, 0)
        self._apply()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        self._prune(trainer, batch_index + 1)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[CHANNELS] = {
            name: architecture["channels"]
            for name, architecture in self.architectures.items()
            if "channels" in architecture
        }

    def _prune(self, trainer: pl.Trainer, batches: int) -> None:
        """Prunes to what the recipe says after so many `batches` of the current epoch."""
        if self.recipe is None or trainer.max_epochs is None:
            return
        per_epoch = int(trainer.num_training_batches)
        share = self.recipe.share(trainer.current_epoch * per_epoch + batches, per_epoch, trainer.max_epochs)
        if share is not None:
            for network in self.networks.values():
                self.recipe.prune(network, share)

    def _apply(self) -> None:
        for network in self.networks.values():
            masks.apply(network)
