"""Cross-entropy with the true labels, the loss of supervised training."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compress.losses.precision import at_least_float32

LabelSmoothing = Annotated[float, Field(ge=0, lt=1)]


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits `(B, C)` with class indices `(B,)`, in nats."""
    return F.cross_entropy(at_least_float32(logits), target, label_smoothing=label_smoothing)


@dataclass(frozen=True)
class CrossEntropy:
    """`loss=cross_entropy`: needs no teacher."""

    label_smoothing: LabelSmoothing = 0.0

    compares_with: ClassVar[str | None] = None

    def __call__(self, logits: Tensor, target: Tensor, reference: None = None, epoch: int = 0) -> dict[str, Tensor]:
        """The terms of the loss under their names; training minimises their sum."""
        return {"cross_entropy": cross_entropy(logits, target, self.label_smoothing)}
