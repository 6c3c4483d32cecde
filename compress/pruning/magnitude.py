"""Magnitude pruning: the weights nearest to zero go, as many as the sparsity says, exactly.

Han et al. 2015 (1506.02626); the schedule in which they go is that of Zhu & Gupta 2017 (1710.01878).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.pruning.recipe import MaskRecipe, left_dense


def largest(scores: Tensor, zeros: int) -> Tensor:
    """A boolean mask in the shape of `scores` that is False for exactly the `zeros` smallest of them.

    Of equal scores those of lower index go first, on every device.
    """
    flat = scores.flatten()
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(zeros).values
    kept = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    kept[ties[zeros - int((flat < threshold).sum()) :]] = True
    return kept.reshape(scores.shape)


def magnitude_masks(
    weights: Mapping[str, Tensor],
    sparsity: float,
    scope: Literal["global", "layer"] = "global",
    kept: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Masks of `weights` of any shapes, False for exactly round(sparsity n) of the n weights of each layer, or of all.

    `kept` has the masks so far: what they do not keep goes first.
    """
    scores = {name: weight.detach().abs().float() for name, weight in weights.items()}
    for name, mask in (kept or {}).items():
        scores[name] = scores[name].masked_fill(~mask, -1.0)
    if scope == "layer":
        return {name: largest(score, round(sparsity * score.numel())) for name, score in scores.items()}
    everything = torch.cat([score.flatten() for score in scores.values()])
    mask = largest(everything, round(sparsity * everything.numel()))
    parts = mask.split([score.numel() for score in scores.values()])
    return {name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


@dataclass(frozen=True)
class Magnitude(MaskRecipe):
    """`pruning=magnitude`: the share `sparsity` of the weights of all layers together, or of each layer, goes."""

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.8
    scope: Literal["global", "layer"] = "global"

    def masks(self, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        return magnitude_masks(weights, share * self.sparsity, self.scope, kept)

    def dense(self, network: nn.Module) -> dict[str, str]:
        return left_dense(self, network, {})
