"""Deep mutual learning: several networks, each with its own optimizer, learn from the labels and from each other.

Zhang et al. 2018, https://arxiv.org/abs/1706.00384
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.methods.classifier import Classifier, summed
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

    @property
    def hinders_record(self) -> str | None:
        return "networks take turns"

    @classmethod
    def number_of_peers(cls, options: Mapping[str, Any]) -> int:
        return int(options["peers"])

    def configure_optimizers(self) -> Any:
        return [self.optimized(network) for network in self.networks.values()]

    def training_step(self, batch: tuple[Tensor, ...], batch_index: int) -> None:
        images, target = batch[:2]
        blend = self.blend(images, batch_index)
        seen = blend(images) if blend else images
        taken_first = self._logits(seen) if self.update == "simultaneous" else None
        all_logits, all_terms = [], []
        for index, optimizer in enumerate(self.optimizers()):
            if taken_first:
                logits, others = taken_first[index], taken_first[:index] + taken_first[index + 1 :]
            else:
                logits, others = self._fresh_logits(seen, index)
            terms = self.loss_terms(logits, target, others, blend)
            optimizer.zero_grad()
            self.manual_backward(torch.stack(list(terms.values())).sum())
            optimizer.step()
            all_logits.append(logits)
            all_terms.append(terms)
        mean = {name: torch.stack([terms[name] for terms in all_terms]).mean() for name in all_terms[0]}
        self.note(summed(all_logits[0], target, mean))
        schedules: Any = self.lr_schedulers()
        for schedule in schedules:
            schedule.step()

    def losses(self, images: Tensor, target: Tensor, blend: Blend | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's part, against the other peers as they are."""
        logits = self._logits(blend(images) if blend else images)
        return logits[0], self.loss_terms(logits[0], target, logits[1:], blend)

    def _logits(self, images: Tensor) -> list[Tensor]:
        return [network(images) for network in self.networks.values()]

    def _fresh_logits(self, images: Tensor, index: int) -> tuple[Tensor, list[Tensor]]:
        """Those of the peer at `index`, and of all others without gradients."""
        networks = list(self.networks.values())
        learner = networks.pop(index)
        with torch.no_grad():
            others = [network(images) for network in networks]
        return learner(images), others
