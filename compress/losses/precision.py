"""The precision in which every loss is computed, whatever autocast does around it."""

from torch import Tensor


def at_least_float32(logits: Tensor) -> Tensor:
    """`logits` in float32 if they came in half precision, unchanged if they are float32 or float64."""
    return logits.float() if logits.element_size() < 4 else logits
