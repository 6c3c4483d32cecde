"""Logit standardisation: student and teacher are compared by the shape of their logits, not by their range.

Sun et al. 2024, https://arxiv.org/abs/2403.01427
"""

from torch import Tensor

from compress.losses.precision import at_least_float32


def standardise(logits: Tensor) -> Tensor:
    """`(z - mean) / (1e-7 + std)` over the classes of `(B, C)`, with the unbiased deviation; float32 or better."""
    logits = at_least_float32(logits)
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / (1e-7 + logits.std(dim=1, keepdim=True))
