"""A transposed convolution written as a convolution, so that a row of its weight makes one output channel.

Dumoulin & Visin 2016 (1603.07285), section 4: zeros between the pixels, the kernel turned by half a circle, stride 1.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def spaced(inputs: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """`inputs` (B, C, ...) with stride - 1 zeros behind each pixel, then padded by zeros as F.pad does, or cut."""
    for dimension, step in enumerate(stride, 2):
        if step > 1:
            after = [0, 0] * (inputs.dim() - dimension - 1)
            inputs = F.pad(inputs.unsqueeze(dimension + 1), [*after, 0, step - 1]).flatten(dimension, dimension + 1)
    return F.pad(inputs, list(padding))


def spacing(
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The `stride` and `padding` that `spaced` takes for a transposed convolution of these arguments."""
    options = [_one_each(option, len(kernel)) for option in (stride, padding, output_padding, dilation)]
    sides = []
    for size, step, cut, more, apart in zip(kernel, *options, strict=True):
        reach = apart * (size - 1) - cut
        sides.append((reach, reach + more - (step - 1)))
    return options[0], tuple(side for pair in reversed(sides) for side in pair)


def turned(weight: Tensor, groups: int) -> Tensor:
    """The convolution's weight (out, in / groups, ...) of the transposed one's, (in, out / groups, ...)."""
    inputs, outputs, *kernel = weight.shape
    grouped = weight.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
    return grouped.reshape(groups * outputs, inputs // groups, *kernel).flip(tuple(range(2, weight.dim())))


def _one_each(option: int | Sequence[int], count: int) -> tuple[int, ...]:
    values = (option,) if isinstance(option, int) else tuple(option)
    return values * count if len(values) == 1 else values
