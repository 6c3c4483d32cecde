"""Mixup and CutMix: every image of a batch is blended with another, or gets a part of it, and so is what it is to be.

Mixup: Zhang et al. 2018, https://arxiv.org/abs/1710.09412; for distillation Beyer et al. 2021 (function matching),
https://arxiv.org/abs/2106.05237. CutMix: Yun et al. 2019, https://arxiv.org/abs/1905.04899
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from compress.data.transfer import moved


@dataclass(frozen=True)
class Blend:
    """`weight` in 0..1 of the image itself, the rest of its partner's; `partner` `(B,)` indexes the batch."""

    weight: float
    partner: Tensor

    def of_partners(self, values: Tensor) -> Tensor:
        """Each image's `values`, `(B, ...)`, replaced by those of its partner."""
        return values.index_select(0, moved(self.partner, values.device))

    def __call__(self, values: Tensor) -> Tensor:
        """Images `(B, ...)` or logits `(B, C)`, blended."""
        return torch.lerp(self.of_partners(values), values, self.weight)


@dataclass(frozen=True)
class Mixup:
    """`mixup=images` and `mixup=logits`: the weight is max(w, 1 - w) of w ~ Beta(alpha, alpha), one for a batch.

    With `teacher_sees: clean` a teacher gets the images unblended, and its logits are blended instead.
    """

    alpha: Annotated[float, Field(gt=0)] = 1.0
    teacher_sees: Literal["mixed", "clean"] = "mixed"

    def draw(self, batch: int, seed: int, epoch: int, batch_index: int, size: Sequence[int] = ()) -> Blend:
        """The blend of one batch, a pure function of the arguments, so that a resumed run blends alike.

        size: height and width of the images, which make no difference here.
        """
        generator = np.random.default_rng([seed, epoch, batch_index])
        weight = generator.beta(self.alpha, self.alpha)
        return Blend(float(max(weight, 1 - weight)), torch.from_numpy(generator.permutation(batch)))


@dataclass(frozen=True)
class Patch(Blend):
    """Images get the `box` (rows from, to, columns from, to) of their partners; `weight` is the share of the rest."""

    box: tuple[int, int, int, int]

    def __call__(self, values: Tensor) -> Tensor:
        """Images `(B, C, H, W)`, pasted; logits `(B, C)`, blended by the areas."""
        if values.dim() == 2:
            return super().__call__(values)
        top, bottom, left, right = self.box
        pasted = values.clone(memory_format=torch.preserve_format)
        pasted[..., top:bottom, left:right] = self.of_partners(values[..., top:bottom, left:right])
        return pasted


@dataclass(frozen=True)
class CutMix:
    """`mixup=cutmix`: one box for a batch, whose share of the area is 1 - w for w ~ Beta(alpha, alpha).

    The part of the box beyond the border falls away, as in the paper. `teacher_sees`: as in `Mixup`.
    """

    alpha: Annotated[float, Field(gt=0)] = 1.0
    teacher_sees: Literal["mixed", "clean"] = "mixed"

    def draw(self, batch: int, seed: int, epoch: int, batch_index: int, size: Sequence[int]) -> Patch:
        """As `Mixup.draw`, for images of `size`: height and width."""
        generator = np.random.default_rng([seed, epoch, batch_index])
        half = 0.5 * math.sqrt(1 - generator.beta(self.alpha, self.alpha))
        box = []
        for length in size:
            centre, reach = int(generator.integers(length)), int(half * length)
            box += [max(centre - reach, 0), min(centre + reach, length)]
        top, bottom, left, right = box
        weight = 1 - (bottom - top) * (right - left) / math.prod(size)
        return Patch(weight, torch.from_numpy(generator.permutation(batch)), (top, bottom, left, right))
