"""Deep mutual learning: several networks, each with its own optimizer, learn from the labels and from each other.

Zhang et al. 2018, https://arxiv.org/abs/1706.00384
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.methods.classifier import Classifier
from compress.methods.mixup import Blend


class DML(Classifier):
    """`method=dml`: the student and `others` learn together, `peers` networks in all.

    `alternate` updates one after the other, always against fresh logits of the rest, as the authors' code does;
    `simultaneous` takes all logits first. The network of the highest validation accuracy is quantized and written.
    """

    needs = frozenset({"peers"})
    loss_compares_with = frozenset({"peers"})

    def __init__(
        self,
        peers: Annotated[int, Field(ge=2)] = 2,
        update: Literal["alternate", "simultaneous"] = "alternate",
        **supplied: Any,
    ) -> None:
        super().__init__(**supplied)
        if len(self.networks) != peers:
            raise ValueError(f"{len(self.networks)} networks were given for {peers} peers")
        self.update = update
        # Several optimizers that take turns within a batch.
        self.automatic_optimization = False

    @classmethod
    def number_of_peers(cls, options: Mapping[str, Any]) -> int:
        return options["peers"]

    def configure_optimizers(self) -> list[dict[str, Any]]:
        return [self.optimized(network) for network in self.networks.values()]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        images, target = batch
        blend = self.blend(len(images), batch_index)
        seen = blend(images) if blend else images
        step = self._alternate if self.update == "alternate" else self._simultaneous
        logits, terms = step(seen, target, blend)
        mean = {name: torch.stack([of_peer[name] for of_peer in terms]).mean() for name in terms[0]}
        self.total_loss(logits[0], target, mean)
        for schedule in self.lr_schedulers():
            schedule.step()

    def losses(self, images: Tensor, target: Tensor, blend: Blend | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's part, against the other peers as they are."""
        logits = self._logits(blend(images) if blend else images)
        return logits[0], self.loss_terms(logits[0], target, logits[1:], blend)

    def _logits(self, images: Tensor) -> list[Tensor]:
        return [network(images) for network in self.networks.values()]

    def _alternate(self, images: Tensor, target: Tensor, blend: Blend | None) -> tuple[list[Tensor], list[dict]]:
        all_logits, all_terms = [], []
        for index, optimizer in enumerate(self.optimizers()):
            networks = list(self.networks.values())
            with torch.no_grad():
                others = [network(images) for network in networks[:index] + networks[index + 1 :]]
            logits = networks[index](images)
            terms = self.loss_terms(logits, target, others, blend)
            self._step(optimizer, terms)
            all_logits.append(logits)
            all_terms.append(terms)
        return all_logits, all_terms

    def _simultaneous(self, images: Tensor, target: Tensor, blend: Blend | None) -> tuple[list[Tensor], list[dict]]:
        logits = self._logits(images)
        terms = [
            self.loss_terms(of_peer, target, logits[:index] + logits[index + 1 :], blend)
            for index, of_peer in enumerate(logits)
        ]
        for optimizer, of_peer in zip(self.optimizers(), terms, strict=True):
            self._step(optimizer, of_peer)
        return logits, terms

    def _step(self, optimizer: Any, terms: dict[str, Tensor]) -> None:
        optimizer.zero_grad()
        self.manual_backward(torch.stack(list(terms.values())).sum())
        optimizer.step()
