"""What quantization leaves: layers as integer codes on grids, and the network that computes with them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.fx import GraphModule

from compress.models.canonical import Layer
from compress.models.masks import is_mask
from compress.quantization.grid import Grid

# The least scale that float16 has.
SMALLEST = 2.0**-24


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer's weight: integer `codes` (N, ...) in the weight's shape on `grid`.

    `bits` is the width that was asked for or, of a network at a rate, what a code takes in the mean at the frequencies
    of the layer's codes. `error` is |Y~ - Y| / |Y - b|, of the layer's outputs on the calibration images, errors of
    earlier layers included; None where the network was trained on its grids. `sensitivity`, of a network at a rate: the
    divergence of its predictions, in nats an image, for an `error` of 1 here alone, if it grew with its square so far.
    """

    codes: Tensor
    grid: Grid
    bits: float
    error: float | None
    sensitivity: float | None = None


@dataclass(frozen=True)
class QuantizedModel:
    """A quantized network and what a file of it needs.

    `model`, a canonical network (see `compress.models.canonical`), computes with the quantized weights, and on
    quantized inputs where a layer has an `input_quantizer` (see `compress.quantization.activations`). `float_state` is
    every other tensor of its state dict (biases, normalisation that could not be folded, grids of inputs), without
    BatchNorm's step counters. `folded` names the (layer, batch norm) pairs; `skipped` says of every other matrix and
    kernel why it stayed float; `tied` names, for each layer without codes of its own, the one whose weight it has.
    """

    model: GraphModule
    layers: dict[str, QuantizedLayer]
    float_state: dict[str, Tensor]
    folded: list[tuple[str, str]]
    skipped: dict[str, str]
    tied: dict[str, str] = field(default_factory=dict)

    @property
    def float_share(self) -> float:
        """The share, 0..1, of all numbers in matrices and kernels that stayed float."""
        parameters = {id(parameter): parameter.numel() for parameter in self.model.parameters() if parameter.dim() > 1}
        quantized = sum(layer.codes.numel() for layer in self.layers.values())
        return 1 - quantized / sum(parameters.values())

    @property
    def rate(self) -> float:
        """Bits of a quantized weight in the mean."""
        bits = sum(layer.bits * layer.codes.numel() for layer in self.layers.values())
        return bits / sum(layer.codes.numel() for layer in self.layers.values())


def in_half(values: Tensor, least: float = -math.inf) -> Tensor | None:
    """`values` as float16 has them, which a file keeps in 2 bytes, in their own type.

    None where one becomes infinite or less than `least`.
    """
    rounded = values.half().to(values.dtype)
    return rounded if bool((rounded.isfinite() & (rounded >= least)).all()) else None


def set_weight(layer: Layer, codes: Tensor, grid: Grid, bias: Tensor | None) -> None:
    """Gives `layer` the weight that `codes` stand for, and `bias`, if there is one."""
    trained = layer.weight.requires_grad
    layer.weight = nn.Parameter(grid.dequantize(codes), requires_grad=trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=trained)


def share_weights(network: nn.Module, tied: Mapping[str, str]) -> None:
    """Gives each layer of `tied` in `network` the weight of the layer that it names."""
    for name, holder in tied.items():
        network.get_submodule(name).weight = network.get_submodule(holder).weight


def float_state(model: nn.Module, quantized: Iterable[str]) -> dict[str, Tensor]:
    """The state dict of `model` without the weights of the `quantized` layers, BatchNorm's step counters and masks."""
    weights = {f"{name}.weight" for name in quantized}
    return {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if name not in weights and not name.endswith("num_batches_tracked") and not is_mask(name)
    }
