"""Magnitude pruning: the weights nearest to zero go, as many as the sparsity says, exactly.

Han et al. 2015 (1506.02626); the schedule in which they go is that of Zhu & Gupta 2017 (1710.01878).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.pruning.recipe import MaskRecipe


def mask_of_largest(scores: Tensor, zeros: int) -> Tensor:
    """A boolean mask in the shape of `scores` that is False for exactly the `zeros` smallest of them.

    Of equal scores those of lower index go first, on every device.
    """
    flat = scores.flatten()
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(zeros).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    mask[ties[zeros - int((flat < threshold).sum()) :]] = True
    return mask.reshape(scores.shape)


def magnitude_masks(
    weights: Mapping[str, Tensor],
    sparsity: float,
    scope: Literal["global", "layer"] = "global",
    current: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Masks of `weights` of any shapes, False for exactly round(sparsity n) of the n weights of a layer, or of all.

    `current` has the masks so far: what they drop goes first.
    """
    scores = {name: weight.detach().abs().float() for name, weight in weights.items()}
    for name, mask in (current or {}).items():
        scores[name] = scores[name].masked_fill(~mask, -1.0)
    if scope == "layer":
        return {name: mask_of_largest(score, round(sparsity * score.numel())) for name, score in scores.items()}
    everything = torch.cat([score.flatten() for score in scores.values()])
    mask = mask_of_largest(everything, round(sparsity * everything.numel()))
    parts = mask.split([score.numel() for score in scores.values()])
    return {name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


@dataclass(frozen=True)
class Magnitude(MaskRecipe):
    """`pruning=magnitude`: the share `sparsity` of the weights of all layers together, or of every layer, goes."""

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.8
    scope: Literal["global", "layer"] = "global"

    def masks(self, weights: Mapping[str, Tensor], current: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        return magnitude_masks(weights, share * self.sparsity, self.scope, current)
