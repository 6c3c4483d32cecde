"""Decoupled knowledge distillation: the target class and the other classes are matched apart.

Zhao et al. 2022, https://arxiv.org/abs/2203.08679
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compress.losses.cross_entropy import LabelSmoothing, cross_entropy
from compress.losses.kd import Temperature
from compress.losses.precision import at_least_float32
from compress.losses.standardisation import standardise


def dkd_terms(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of the paper, both times T^2 and averaged over the batch: two scalars in nats.

    Logits are `(B, C)` with C >= 2, `target` holds class indices `(B,)`. TCKD is the divergence of the two-way
    distributions [p_y, 1 - p_y]; NCKD that of the softmax over the C - 1 other classes, which are gathered, not
    masked: a mask of -inf turns into NaN inside the divergence, a large negative number leaks mass.
    """
    student_log_binary, student_log_others = _decouple(student_logits, target, temperature)
    teacher_log_binary, teacher_log_others = _decouple(teacher_logits, target, temperature)

    def divergence(log_student: Tensor, log_teacher: Tensor) -> Tensor:
        return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)

    return divergence(student_log_binary, teacher_log_binary), divergence(student_log_others, teacher_log_others)


def _decouple(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logarithms of [p_y, 1 - p_y], `(B, 2)`, and of the softmax over the other classes, `(B, C - 1)`."""
    scaled = at_least_float32(logits) / temperature
    batch, classes = scaled.shape
    others = torch.arange(classes - 1, device=logits.device).expand(batch, -1)
    others = others + (others >= target[:, None])
    target_logit, other_logits = scaled.gather(1, target[:, None]), scaled.gather(1, others)
    binary = torch.cat([target_logit, other_logits.logsumexp(dim=1, keepdim=True)], dim=1)
    return F.log_softmax(binary, dim=1), F.log_softmax(other_logits, dim=1)


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
        student_logits = logits
        if self.standardise:
            student_logits, teacher_logits = standardise(logits), standardise(teacher_logits)
        target_term, others_term = dkd_terms(student_logits, teacher_logits, target, self.temperature)
        return {
            "cross_entropy": cross_entropy(logits, target, self.label_smoothing),
            "tckd": ramp * self.alpha * target_term,
            "nckd": ramp * self.beta * others_term,
        }
