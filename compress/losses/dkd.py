"""Decoupled knowledge distillation: the target class and the other classes are matched apart.

Zhao et al. 2022, https://arxiv.org/abs/2203.08679
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.losses.cross_entropy import LabelSmoothing, cross_entropy
from compress.losses.kd import Temperature, kd_loss, standardise
from compress.losses.precision import at_least_float32


def dkd_terms(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of the paper, both times T^2 and averaged over the batch: two scalars in nats.

    Logits are `(B, C)` with C >= 2, `target` holds class indices `(B,)`. TCKD is the divergence of the two-way
    distributions [p_y, 1 - p_y]; NCKD that of the softmax over the C - 1 other classes, which are gathered, not
    masked: a mask of -inf turns into NaN inside the divergence, a large negative number leaks mass.
    """
    binary, others = _decouple(student_logits, target, temperature)
    teacher_binary, teacher_others = _decouple(teacher_logits, target, temperature)
    factor = temperature**2
    return factor * kd_loss(binary, teacher_binary, 1.0), factor * kd_loss(others, teacher_others, 1.0)


def _decouple(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits of [p_y, 1 - p_y], `(B, 2)`, and of the softmax over the other classes, `(B, C - 1)`, both at T."""
    scaled = at_least_float32(logits) / temperature
    batch, classes = scaled.shape
    others = torch.arange(classes - 1, device=logits.device).expand(batch, -1)
    others = others + (others >= target[:, None])
    target_logit, other_logits = scaled.gather(1, target[:, None]), scaled.gather(1, others)
    return torch.cat([target_logit, other_logits.logsumexp(dim=1, keepdim=True)], dim=1), other_logits


@dataclass(frozen=True)
class DKD:
    """`loss=dkd`: `CE + min(epoch / warmup, 1) (alpha TCKD + beta NCKD)`, where the first epoch counts as 1.

    With `standardise` the two terms compare standardised logits; its paper takes alpha 9, beta 72 at temperature 2.
    """

    temperature: Temperature = 4.0
    alpha: Annotated[float, Field(ge=0)] = 1.0
    beta: Annotated[float, Field(ge=0)] = 8.0
    warmup_epochs: Annotated[int, Field(ge=0)] = 20
    standardise: bool = False
    label_smoothing: LabelSmoothing = 0.0

    compares_with: ClassVar[str | None] = "teacher"

    def __call__(self, logits: Tensor, target: Tensor, teacher_logits: Tensor, epoch: int = 0) -> dict[str, Tensor]:
        """The weighted terms under their names; training minimises their sum. `epoch` counts from 0."""
        ramp = min((epoch + 1) / max(self.warmup_epochs, 1), 1.0)
        scaled = standardise if self.standardise else at_least_float32
        target_term, others_term = dkd_terms(scaled(logits), scaled(teacher_logits), target, self.temperature)
        return {
            "cross_entropy": cross_entropy(logits, target, self.label_smoothing),
            "tckd": ramp * self.alpha * target_term,
            "nckd": ramp * self.beta * others_term,
        }
