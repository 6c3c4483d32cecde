"""Knowledge distillation: the student matches the teacher's softened distribution.

Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531; standardised logits, which are compared by their shape
and not by their range: Sun et al. 2024, https://arxiv.org/abs/2403.01427
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compress.losses.cross_entropy import LabelSmoothing, cross_entropy
from compress.losses.precision import at_least_float32

Temperature = Annotated[float, Field(gt=0)]


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """`T^2 * mean_b sum_c p_t (log p_t - log p_s)` with `p = softmax(logits / T)`.

    Logits are `(B, C)`; the result is a scalar in nats. The factor T^2 keeps the size of the gradient independent
    of the temperature (section 2 of the paper). Computed in log space and in float32 or better.
    """
    log_student = F.log_softmax(at_least_float32(student_logits) / temperature, dim=1)
    log_teacher = F.log_softmax(at_least_float32(teacher_logits) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def standardise(logits: Tensor) -> Tensor:
    """`(z - mean) / (1e-7 + std)` over the classes of `(B, C)`, with the unbiased deviation; float32 or better."""
    logits = at_least_float32(logits)
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / (1e-7 + logits.std(dim=1, keepdim=True))


@dataclass(frozen=True)
class KD:
    """`loss=kd`: `(1 - alpha) CE + alpha kd_weight KD`, with `standardise` on standardised logits.

    The paper of the standardisation takes 0.1 CE + 9 KD at temperature 2, that is alpha 0.9 and kd_weight 10.
    """

    temperature: Temperature = 4.0
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9
    kd_weight: Annotated[float, Field(gt=0)] = 1.0
    standardise: bool = False
    label_smoothing: LabelSmoothing = 0.0

    compares_with: ClassVar[str | None] = "teacher"

    def __call__(self, logits: Tensor, target: Tensor, teacher_logits: Tensor, epoch: int = 0) -> dict[str, Tensor]:
        """The weighted terms under their names; training minimises their sum."""
        scaled = standardise if self.standardise else at_least_float32
        divergence = kd_loss(scaled(logits), scaled(teacher_logits), self.temperature)
        return {
            "cross_entropy": (1 - self.alpha) * cross_entropy(logits, target, self.label_smoothing),
            "kd": self.alpha * self.kd_weight * divergence,
        }
