"""Mixup: every image of a batch is blended with another, and so is what it is to be.

Zhang et al. 2018, https://arxiv.org/abs/1710.09412; for distillation Beyer et al. 2021 (function matching),
https://arxiv.org/abs/2106.05237
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor


@dataclass(frozen=True)
class Blend:
    """`weight` in 0.5..1 of the image itself, the rest of its partner's; `partner` `(B,)` indexes the batch."""

    weight: float
    partner: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Images `(B, ...)` or logits `(B, C)`, blended."""
        return torch.lerp(values[self.partner], values, self.weight)


@dataclass(frozen=True)
class Mixup:
    """`mixup=images` and `mixup=logits`: the weight is max(w, 1 - w) of w ~ Beta(alpha, alpha), one for a batch.

    With `teacher_sees: clean` a teacher gets the images unblended, and its logits are blended instead.
    """

    alpha: Annotated[float, Field(gt=0)] = 1.0
    teacher_sees: Literal["mixed", "clean"] = "mixed"

    def draw(self, batch: int, seed: int, epoch: int, batch_index: int) -> Blend:
        """The blend of one batch, a pure function of the arguments, so that a resumed run blends alike."""
        generator = np.random.default_rng([seed, epoch, batch_index])
        weight = generator.beta(self.alpha, self.alpha)
        return Blend(float(max(weight, 1 - weight)), torch.from_numpy(generator.permutation(batch)))
