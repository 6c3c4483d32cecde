"""Quantized inputs of layers: a child `input_quantizer` that a hook runs in front of the layer.

The layer keeps its own class, so whatever reads a network (tracing, folding, counting) still knows it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.arguments import check_fields
from compress.quantization.patches import spread


class InputQuantizer(nn.Module):
    """`x -> scale * (clamp(round(x / scale) + zero_point, 0, levels - 1) - zero_point)` for tensors of any shape.

    One float32 `scale` and one integer `zero_point` for all of a layer's input, both buffers. Raises ValueError for a
    scale that is not positive and finite, levels that are no power of two from 4 to 256, and a zero_point off the grid.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: float | Tensor, zero_point: int | Tensor, levels: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float32).detach().clone())
        self.register_buffer("zero_point", torch.as_tensor(zero_point, dtype=torch.uint8).detach().clone())
        self.levels = levels
        if levels not in [2**bits for bits in range(2, 9)]:
            raise ValueError(f"levels: {levels}; inputs have 4, 8, ... or 256 levels")
        self.check()

    @property
    def bits(self) -> int:
        return (self.levels - 1).bit_length()

    def check(self) -> None:
        """Raises ValueError where a loaded scale or zero point is none."""
        if not (torch.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale: {self.scale.item()}; a scale is finite and above 0")
        if int(self.zero_point) >= self.levels:
            raise ValueError(f"zero_point: {int(self.zero_point)}; with {self.levels} levels it is below that")

    def steps(self, x: Tensor) -> Tensor:
        """`x` in steps of the grid, within it and not rounded."""
        zero_point = self.zero_point.to(x.dtype)
        return (x / self.scale).clamp(-zero_point, self.levels - 1 - zero_point)

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(x).round() * self.scale


# Values that a quantile is taken of and that an error is measured on, at most, spread over the calibration images.
SAMPLE, COARSE = 1 << 20, 1 << 16


@dataclass(frozen=True)
class Activations:
    """How the range of a layer's inputs is chosen.

    range: "min_max" spans all values, "percentile" from the (1 - percentile) to the percentile quantile, and "mse" the
    share of the range of all values that has the least squared error.
    """

    range: Literal["mse", "min_max", "percentile"] = "mse"
    percentile: Annotated[float, Field(gt=0.5, le=1)] = 0.9999

    def __post_init__(self) -> None:
        check_fields(self)

    @torch.no_grad()
    def calibrate(self, inputs: Sequence[Tensor], bits: int) -> InputQuantizer:
        """The grid of 2^bits levels for tensors like `inputs`, of any shapes; one-sided where no value is negative.

        Raises ValueError for bits outside 2..8.
        """
        values = torch.cat([tensor.detach().flatten().float() for tensor in inputs])
        lowest, highest = min(values.min().item(), 0.0), max(values.max().item(), 0.0)

        def sample(size: int) -> Tensor:
            return values[:: spread(-(-len(values) // size), inputs[0][0].numel())]

        if self.range == "percentile":
            # torch.quantile refuses more than 2^24 values, and the sample has fewer.
            quantiles = torch.tensor([1 - self.percentile, self.percentile], device=values.device)
            low, high = sample(SAMPLE).quantile(quantiles).tolist()
            return _spanning(min(low, 0.0), max(high, 0.0), bits).to(values.device)
        if self.range == "min_max":
            return _spanning(lowest, highest, bits).to(values.device)
        shares = torch.linspace(0.1, 1, 91).tolist()
        candidates = [_spanning(share * lowest, share * highest, bits).to(values.device) for share in shares]
        coarse = sample(COARSE)
        return min(candidates, key=lambda grid: (grid(coarse) - coarse).square().mean().item())


def _spanning(lowest: float, highest: float, bits: int) -> InputQuantizer:
    scale = (highest - lowest) / (2**bits - 1)
    if scale < torch.finfo(torch.float32).tiny:
        return InputQuantizer(1.0, 0, 2**bits)
    return InputQuantizer(scale, round(-lowest / scale), 2**bits)


def attach_input_quantizer(layer: nn.Module, quantizer: nn.Module) -> None:
    """From now on `layer` computes on `quantizer(x)`; one that it had before is replaced."""
    if not hasattr(layer, "input_quantizer"):
        layer.register_forward_pre_hook(_quantize_input)
    layer.input_quantizer = quantizer


def detach_input_quantizer(layer: nn.Module) -> None:
    """Undoes `attach_input_quantizer`, if there is anything to undo."""
    if hasattr(layer, "input_quantizer"):
        del layer.input_quantizer
        for key, hook in list(layer._forward_pre_hooks.items()):
            if hook is _quantize_input:
                del layer._forward_pre_hooks[key]


def input_quantizers(model: nn.Module) -> dict[str, InputQuantizer]:
    """Name of each layer with a fixed grid for its input, and that grid."""
    return {
        name: layer.input_quantizer
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "input_quantizer", None), InputQuantizer)
    }


def _quantize_input(layer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    first, *others = arguments
    return layer.get_submodule("input_quantizer")(first), *others
