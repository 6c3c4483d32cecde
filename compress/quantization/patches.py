"""The inputs that a Conv2d or Linear multiplies its weights with, as columns of a matrix."""

import math

import torch.nn.functional as F
from torch import Tensor, nn


def with_rows(layer: nn.Conv1d) -> nn.Conv2d:
    """The Conv2d that does to (B, C, 1, L) what `layer` does to (B, C, L); it has no values."""
    return nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        kernel_size=(1, layer.kernel_size[0]),
        stride=(1, layer.stride[0]),
        padding=layer.padding if isinstance(layer.padding, str) else (0, layer.padding[0]),
        dilation=(1, layer.dilation[0]),
        groups=layer.groups,
        padding_mode=layer.padding_mode,
        device="meta",
    )


def padding_of(layer: nn.Conv2d) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) that a Conv2d pads its input with; torch puts the odd one of "same" at the end."""
    if not isinstance(layer.padding, str):
        vertical, horizontal = layer.padding
        return (horizontal, horizontal, vertical, vertical)
    if layer.padding == "valid":
        return (0, 0, 0, 0)
    total = [dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    (top, left), (bottom, right) = [side // 2 for side in total], [side - side // 2 for side in total]
    return (left, right, top, bottom)


def patches(layer: nn.Conv2d | nn.Linear, inputs: Tensor) -> Tensor:
    """(groups, d, n): column i of group g is what a row of the group's weights, flattened to (d,), is multiplied with.

    inputs (B, C, H, W) for a Conv2d, n = B * output height * output width, any stride, padding, padding mode, dilation
    and groups; (..., d) for a Linear, n = the product of the leading sizes.
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(1, -1, inputs.shape[-1]).transpose(1, 2)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padding = padding_of(layer)
    if any(padding):
        inputs = F.pad(inputs, padding, mode=mode)
    windows = inputs.transpose(0, 1)  # (C, B, H, W)
    for dimension in (0, 1):
        reach = layer.dilation[dimension] * (layer.kernel_size[dimension] - 1) + 1
        windows = windows.unfold(2 + dimension, reach, layer.stride[dimension])
        windows = windows[..., :: layer.dilation[dimension]]
    # (C, B, oh, ow, kh, kw) -> (groups, C/groups * kh * kw, B * oh * ow)
    depth = inputs.shape[1] // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
    return windows.permute(0, 4, 5, 1, 2, 3).reshape(layer.groups, depth, -1)


def live_columns(layer: nn.Conv2d | nn.Linear, inputs: Tensor) -> Tensor | None:
    """The columns (of d) whose kernel position ever meets a pixel; None: all. The others see the zeros of the padding.

    On a 1x1 map only the centre of a padded 3x3 kernel does, and 8/9 of the layer's columns need no Gram.
    """
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros":
        return None
    pixels = inputs.new_ones(1, 1, *inputs.shape[2:])
    # torch annotates the pairs of a Conv2d as tuples of any length.
    probe = nn.Conv2d(1, 1, layer.kernel_size, layer.stride, layer.padding, layer.dilation, device="meta")  # type: ignore[arg-type]
    live = patches(probe, pixels)[0].any(1)
    return None if bool(live.all()) else live.repeat(layer.weight.shape[1]).nonzero()[:, 0]


def spread(step: int, period: int) -> int:
    """The least step of at least `step` without a factor in common with `period`.

    So that every so many of what repeats with `period`, the places of an image say, meet all of it and not a few.
    """
    while math.gcd(step, period) > 1:
        step += 1
    return step


def row_count(layer: nn.Conv2d | nn.Linear, inputs: Tensor) -> int:
    """How many columns `patches` would have for one group."""
    if isinstance(layer, nn.Linear):
        return inputs.numel() // max(1, inputs.shape[-1])
    left, right, top, bottom = padding_of(layer)
    sides = []
    for dimension, padding in ((0, top + bottom), (1, left + right)):
        reach = layer.dilation[dimension] * (layer.kernel_size[dimension] - 1) + 1
        sides.append((inputs.shape[2 + dimension] + padding - reach) // layer.stride[dimension] + 1)
    return inputs.shape[0] * sides[0] * sides[1]
