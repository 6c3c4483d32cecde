"""Attention transfer: where a network looks, compared between student and teacher.

Zagoruyko & Komodakis 2017, https://arxiv.org/abs/1612.03928
"""

from torch import Tensor
from torch.nn import functional as F

from compress.losses.precision import at_least_float32


def attention_map(features: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """`(B, C, H, W) -> (B, H * W)`: the mean over channels of the squares, of length 1 for every image.

    With `size = (h, w)` the mean of squares is averaged down to `(B, h * w)` first.
    """
    energy = at_least_float32(features).square().mean(dim=1)
    if size is not None:
        energy = F.adaptive_avg_pool2d(energy, size)
    return F.normalize(energy.flatten(1), dim=1)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of the attention maps of `(B, C, H, W)` and `(B, D, h, w)`, a scalar.

    Maps of different sizes are compared at the smaller height and width. No gradient reaches the teacher.
    """
    size = smaller_size(student, teacher)
    return F.mse_loss(attention_map(student, size), attention_map(teacher.detach(), size))


def smaller_size(one: Tensor, other: Tensor) -> tuple[int, int]:
    """The smaller height and the smaller width of two feature maps."""
    return min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3])
