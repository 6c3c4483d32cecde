"""N:M sparsity: of every M weights that follow each other along the input channels, the N largest stay.

2:4 is what the sparse tensor cores of GPUs multiply (Mishra et al. 2021, 2104.08378).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.errors import UserError
from compress.models.masks import weight_of
from compress.pruning.recipe import MaskRecipe


def nm_mask(weight: Tensor, n: int, m: int, current: Tensor | None = None) -> Tensor:
    """A boolean mask of `weight` (O, I, ...), True for the `n` largest of every `m` along the I input channels.

    I is divisible by m. Of equal weights those of lower index stay. What the `current` mask drops goes first.
    """
    scores = weight.detach().abs().float()
    if current is not None:
        scores = scores.masked_fill(~current, -1.0)
    grouped = scores.movedim(1, -1).unflatten(-1, (-1, m))
    best = grouped.sort(descending=True, stable=True).indices[..., :n]
    mask = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, best, True)
    return mask.flatten(-2).movedim(-1, 1).contiguous()


@dataclass(frozen=True)
class NM(MaskRecipe):
    """`pruning=nm`: `n` of every `m`. Layers whose input channels `m` does not divide, the stem often, stay dense.

    Within a schedule, m of m become n of m by one at a time, as the cubic share reaches it.
    """

    n: Annotated[int, Field(ge=1)] = 2
    m: Annotated[int, Field(ge=2)] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n > self.m:
            raise UserError(f"pruning.n: found {self.n} of every {self.m}; accepted: 1 to pruning.m, {self.m}")

    def masks(self, weights: Mapping[str, Tensor], current: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        # Rounded, because 1 - (1 - 1)^3 need not be reached in floating point.
        n = self.m - int(share * (self.m - self.n) + 1e-9)
        return {name: nm_mask(weight, n, self.m, current.get(name)) for name, weight in weights.items()}

    def unfit(self, chosen: Mapping[str, nn.Module]) -> dict[str, str]:
        inputs = {name: weight_of(layer).shape[1] for name, layer in chosen.items()}
        reason = "{} input channels, not divisible by {}"
        return {name: reason.format(count, self.m) for name, count in inputs.items() if count % self.m}
