"""Deep mutual learning: peers learn from the labels and from each other.

Zhang et al. 2018, https://arxiv.org/abs/1706.00384
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress.losses.cross_entropy import LabelSmoothing, cross_entropy
from compress.losses.kd import Temperature, kd_loss


def mutual_loss(logits: Tensor, peer_logits: Sequence[Tensor], temperature: float) -> Tensor:
    """`mean_j T^2 KL(p_j || p)` of one peer's logits `(B, C)` against those of the others, a scalar in nats.

    No gradient reaches the others. The paper's temperature is 1. Raises ValueError without another peer.
    """
    if not peer_logits:
        raise ValueError("mutual learning needs the logits of at least one other peer")
    return torch.stack([kd_loss(logits, peer.detach(), temperature) for peer in peer_logits]).mean()


@dataclass(frozen=True)
class DML:
    """`loss=dml`: the loss of one peer, `CE + mean_j KL`."""

    temperature: Temperature = 1.0
    label_smoothing: LabelSmoothing = 0.0

    compares_with: ClassVar[str | None] = "peers"

    def __call__(
        self, logits: Tensor, target: Tensor, peer_logits: Sequence[Tensor], epoch: int = 0
    ) -> dict[str, Tensor]:
        """The terms under their names; training minimises their sum."""
        return {
            "cross_entropy": cross_entropy(logits, target, self.label_smoothing),
            "mutual": mutual_loss(logits, peer_logits, self.temperature),
        }
