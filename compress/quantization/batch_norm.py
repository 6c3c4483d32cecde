"""Re-estimation of BatchNorm after quantization: channels get back the mean and deviation that they had in float.

What a quantized layer puts out has other statistics than those that BatchNorm was trained to remove (Sun et al. 2019,
"Hybrid 8-bit floating point training", and Finkelstein et al. 2019 correct them on training images). Where the norm
has been folded into a layer, the layer's scales and bias are what is left to correct; a norm that stands alone has its
running statistics moved.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.models.canonical import Layer
from compress.quantization.grid import Grid

# Of deviations; a channel that needs more than this is broken in another way.
LARGEST = 2.0


@torch.no_grad()
def match_output_statistics(
    layer: Layer, grid: Grid, changed: Sequence[Tensor], outputs: Sequence[Tensor]
) -> tuple[Grid, Tensor]:
    """(grid, bias) of a quantized `layer`, whose weight lies on `grid`, with the outputs' statistics of the float one.

    changed, outputs: of the quantized and the float layer, a tensor (B, N, ...) or, of a Linear, (..., N) for each
    batch. Deviations are corrected by a factor of at most LARGEST either way.
    """
    mean, deviation = statistics(layer, changed)
    wanted_mean, wanted_deviation = statistics(layer, outputs)
    factor = torch.where(deviation > 0, wanted_deviation / deviation.clamp_min(torch.finfo(mean.dtype).tiny), 1.0)
    factor = torch.where(wanted_deviation > 0, factor, 1.0).clamp(1 / LARGEST, LARGEST)
    old = mean.new_zeros(()) if layer.bias is None else layer.bias.to(mean.dtype)
    bias = wanted_mean - factor * (mean - old)
    scale = grid.scale * factor.to(grid.scale.dtype)
    return Grid(scale, grid.zero_point, grid.levels), bias.to(layer.weight.dtype)


@torch.no_grad()
def move_statistics(norm: nn.BatchNorm2d, changed: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Moves the running mean and variance of `norm` as its inputs did, from those in the float network to `changed`.

    A norm without running statistics, which takes those of each batch, is left as it is.
    """
    if norm.running_mean is None or norm.running_var is None:
        return
    mean, deviation = statistics(norm, changed)
    old_mean, old_deviation = statistics(norm, inputs)
    ratio = torch.where(old_deviation > 0, deviation / old_deviation.clamp_min(torch.finfo(mean.dtype).tiny), 1.0)
    norm.running_mean += (mean - old_mean).to(norm.running_mean.dtype)
    norm.running_var *= ratio.clamp(1 / LARGEST, LARGEST).square().to(norm.running_var.dtype)


def statistics(layer: nn.Module, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel (N,) over all tensors, in float64."""
    channel = -1 if isinstance(layer, nn.Linear) else 1
    rows = [tensor.movedim(channel, 0).flatten(1).double() for tensor in tensors]
    count = sum(part.shape[1] for part in rows)
    mean = torch.stack([part.sum(1) for part in rows]).sum(0) / count
    variance = torch.stack([(part - mean[:, None]).square().sum(1) for part in rows]).sum(0) / count
    return mean, variance.sqrt()
