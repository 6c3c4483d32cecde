"""What quantization leaves: layers as integer codes on grids, and the network that computes with them."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from compress.models.masks import is_mask
from compress.quantization.grid import Grid


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer's weight: integer `codes` (N, ...) in the weight's shape on `grid`, asked for at `bits` bits.

    `error` is |Y~ - Y| / |Y - b|, of the layer's outputs on the calibration images, errors of earlier layers included;
    None where the network was trained on its grids.
    """

    codes: Tensor
    grid: Grid
    bits: int
    error: float | None


@dataclass(frozen=True)
class QuantizedModel:
    """A quantized network and what a file of it needs.

    `model` computes with the quantized weights, and on quantized inputs where a layer has an `input_quantizer` (see
    `compress.quantization.activations`); `float_state` is every other tensor of its state dict (biases, normalisation
    that could not be folded, grids of inputs), without BatchNorm's step counters; `folded` names the (layer, batch
    norm) pairs; `skipped` says of every other Conv2d and Linear why it stayed float.
    """

    model: nn.Module
    layers: dict[str, QuantizedLayer]
    float_state: dict[str, Tensor]
    folded: list[tuple[str, str]]
    skipped: dict[str, str]

    def widths(self) -> dict[str, int]:
        """Bits of each quantized layer."""
        return {name: layer.bits for name, layer in self.layers.items()}


def set_weight(layer: nn.Module, codes: Tensor, grid: Grid, bias: Tensor | None) -> None:
    """Gives `layer` the weight that `codes` stand for, and `bias`, if there is one."""
    trained = layer.weight.requires_grad
    layer.weight = nn.Parameter(grid.dequantize(codes), requires_grad=trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=trained)


def float_state(model: nn.Module, quantized: Iterable[str]) -> dict[str, Tensor]:
    """The state dict of `model` without the weights of the `quantized` layers, BatchNorm's step counters and masks."""
    weights = {f"{name}.weight" for name in quantized}
    return {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if name not in weights and not name.endswith("num_batches_tracked") and not is_mask(name)
    }
