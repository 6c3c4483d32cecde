"""Biases as kernels on integers add them: in whole steps of the sums that they are added to.

Such a kernel sums products of codes, so that a step is the scale of the input times that of the weight's channel. A
layer with inputs of 8 bits has such a bias everywhere, so that no runtime rounds what others do not. With fewer levels
the steps would be too coarse for a network that no kernel on integers computes; there the kernels alone round.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compress.models.canonical import Layer, layer_of
from compress.quantization.activations import InputQuantizer
from compress.quantization.grid import Grid
from compress.quantization.quantized import QuantizedLayer, QuantizedModel, in_half

LEVELS = 256  # of inputs of 8 bits


def rounded(bias: Tensor, scale: Tensor, input_scale: Tensor) -> Tensor:
    """`bias` (N,) in whole steps of `scale` (N,) times `input_scale` (0-dimensional), as far as its type has them."""
    step = (scale * input_scale).double()
    return ((bias.double() / step).round() * step).to(bias.dtype)


def round_bias(layer: Layer, grid: Grid) -> None:
    """Rounds the bias of a `layer` with its weight on `grid`, if it has one and a fixed grid of 8 bits for inputs."""
    bias, inputs = layer.bias, _wide_inputs(layer)
    if bias is not None and inputs is not None:
        layer.bias = nn.Parameter(rounded(bias.detach(), grid.scale, inputs.scale), requires_grad=bias.requires_grad)


def round_biases(network: nn.Module, layers: Mapping[str, QuantizedLayer], tied: Mapping[str, str]) -> None:
    """`round_bias` for all `layers` of `network`, and those that are `tied` to them."""
    for name in [*layers, *tied]:
        round_bias(layer_of(network, name), layers[tied.get(name, name)].grid)


def short_biases(quantized: QuantizedModel) -> dict[str, Tensor]:
    """By name, values of float16 that are rounded to a bias of `quantized`, for each rounded bias that has such."""
    found = {}
    for name in [*quantized.layers, *quantized.tied]:
        layer = layer_of(quantized.model, name)
        bias, inputs = layer.bias, _wide_inputs(layer)
        short = None if bias is None or inputs is None else in_half(bias.detach())
        if bias is not None and inputs is not None and short is not None:
            scale = quantized.layers[quantized.tied.get(name, name)].grid.scale
            if torch.equal(rounded(short, scale, inputs.scale), bias):
                found[f"{name}.bias"] = short
    return found


def _wide_inputs(layer: Layer) -> InputQuantizer | None:
    """The grid of the inputs of `layer`, if it has the most levels."""
    inputs = getattr(layer, "input_quantizer", None)
    return inputs if isinstance(inputs, InputQuantizer) and inputs.levels == LEVELS else None
