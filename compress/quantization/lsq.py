"""Learned step size quantization: a network trained on the grids that it will be stored on.

Esser et al. 2020 (1902.08153). The steps of weights (per output channel) and of activations (per layer input) are
parameters; rounding passes gradients straight through, and the gradient of a step is scaled by
1 / sqrt(elements * levels above zero). `FakeQuantization.prepare` puts this into a network, `bake` makes integer codes
of a trained one. BatchNorm is folded when baking: a scale per output channel takes its factor up exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.collective import mean_of_processes
from compress.errors import UserError
from compress.models.baking import bake_parametrizations, copied
from compress.models.canonical import LAYERS, canonical, layers
from compress.models.folding import batch_norm_gain, batch_norm_of, find_foldable, fold_pairs
from compress.quantization.activations import InputQuantizer, attach_input_quantizer, detach_input_quantizer
from compress.quantization.biases import round_biases
from compress.quantization.coded_steps import CodedBits, CodedStep, Rate, coded_bits
from compress.quantization.grid import Grid, code_dtype, per_channel
from compress.quantization.learned_step import check_finite, fake_quantize, positive
from compress.quantization.preparation import choose_layers
from compress.quantization.quantized import SMALLEST, QuantizedLayer, QuantizedModel, float_state, in_half
from compress.quantization.scales import mse_grid

Width = Annotated[int, Field(ge=2, le=8)]


@dataclass(frozen=True)
class FakeQuantization:
    """Which layers of a network are trained on grids, and of how many bits.

    `weight_bits` or `activation_bits` None leaves those float. `first_last_bits` is for both, in the first and the last
    layer in execution order; None: as in the others. `skip` names, or matches by globs, layers that stay float.
    `weight_rate`, in place of `weight_bits`: coded bits of a weight in the mean, those of the first and the last layer
    included, see `compress.quantization.coded_steps`.
    """

    weight_bits: Width | None = 4
    activation_bits: Width | None = None
    first_last_bits: Width | None = 8
    skip: tuple[str, ...] = ()
    weight_rate: Rate | None = None

    @property
    def keeps_weights(self) -> bool:
        """Whether weights stay float."""
        return self.weight_bits is None and self.weight_rate is None

    def prepare(self, model: nn.Module, input_shape: Sequence[int]) -> nn.Module:
        """A copy of the float network `model`, for images (C, H, W), with fake-quantized weights and inputs of layers.

        Layers are the Conv1d, Conv2d and Linear of torch.nn itself with weights of their own: a subclass may multiply
        something else than its weight. Steps of weights start at the least squared error, steps of inputs with the
        first batch that is trained on. Raises UserError for a network that cannot be traced or leaves no layer, and
        for a `skip` that matches none.
        """
        network = canonical(model, input_shape)
        choice = choose_layers(network, self.skip)
        prepared = copied(model)
        modules, outer = dict(prepared.named_modules()), [*layers(network)]
        chosen = [name for name in choice.order if _is_plain(modules.get(name)) and name not in choice.tied.values()]
        if not chosen:
            raise UserError(
                f"{type(model).__name__}: found no layer to train on a grid; accepted: Conv1d, Conv2d or Linear of "
                "torch.nn whose weight is a parameter of its own"
            )
        for name in chosen:
            layer = modules[name]
            wide = self.first_last_bits if name in (outer[0], outer[-1]) else None
            if self.activation_bits is not None:
                attach_input_quantizer(layer, InputStep(wide or self.activation_bits))
            if not self.keeps_weights:
                parametrize.register_parametrization(layer, "weight", self._step(layer.weight, wide))
        return prepared

    def _step(self, weight: Tensor, wide: int | None) -> "CodedStep | WeightStep":
        if self.weight_bits is None:
            return CodedStep(weight)
        return WeightStep(weight, wide or self.weight_bits)

    @torch.no_grad()
    def bake(self, prepared: nn.Module, input_shape: Sequence[int]) -> QuantizedModel:
        """Integer codes of a network that `prepare` made: what they compute is what it computes in eval mode, but for
        the biases of layers on integers, which are rounded, see `compress.quantization.biases`.

        Where the factor of a BatchNorm is negative, a channel's codes are mirrored. Raises UserError, naming the layer,
        for values that are not finite.
        """
        plain = canonical(float_network(prepared), input_shape)
        pairs = find_foldable(plain)
        norms = {layer: batch_norm_of(plain, norm) for layer, norm in pairs}
        skipped = choose_layers(plain, self.skip).skipped
        solved = {}
        for name, layer in prepared.named_modules():
            if not _is_on_grid(layer):
                continue
            [step] = layer.parametrizations.weight
            codes, grid, bits = step.codes(layer.parametrizations.weight.original, name)
            if name in norms:
                codes, grid = _times(batch_norm_gain(norms[name]), codes, grid)
            solved[name] = QuantizedLayer(codes, grid, bits, None)
        reason = "weight_bits: none" if self.keeps_weights else "has no weight of its own"
        skipped.update((name, reason) for name in layers(plain) if name not in solved and name not in skipped)
        fold_pairs(plain, pairs)
        if self.weight_rate is not None:
            solved = {name: _shortened(layer, plain.get_submodule(name)) for name, layer in solved.items()}
        for name, layer in solved.items():
            plain.get_submodule(name).weight = nn.Parameter(layer.grid.dequantize(layer.codes))
        for name, layer in prepared.named_modules():
            if hasattr(layer, "input_quantizer"):
                attach_input_quantizer(plain.get_submodule(name), layer.input_quantizer.fixed(name))
        round_biases(plain, solved, {})
        return QuantizedModel(plain.eval(), solved, float_state(plain, solved), pairs, skipped)


def _shortened(found: QuantizedLayer, layer: nn.Module) -> QuantizedLayer:
    """`found` with scales of float16, and its `layer` with such a bias, where they are in its range.

    Beside codes of few bits they would be much of the file. They change a weight by at most 2^-11 of it, and codes of
    a rate by a large part of a step.
    """
    bias, scale = getattr(layer, "bias", None), in_half(found.grid.scale, least=SMALLEST)
    if bias is not None:
        shorter = in_half(bias.detach())
        layer.bias = bias if shorter is None else nn.Parameter(shorter, requires_grad=bias.requires_grad)
    if scale is None:
        return found
    return replace(found, grid=Grid(scale, found.grid.zero_point, found.grid.levels))


def float_network(prepared: nn.Module) -> nn.Module:
    """A copy of a network that `prepare` made, with the float weights behind the grids and float activations."""
    plain = copied(prepared)
    for layer in list(plain.modules()):
        detach_input_quantizer(layer)
        if _is_on_grid(layer):
            bake_parametrizations(layer, original=True)
    return plain


def _is_plain(module: nn.Module | None) -> bool:
    return module is not None and type(module) in LAYERS and not module._forward_pre_hooks


def _is_on_grid(module: nn.Module) -> bool:
    is_parametrized = parametrize.is_parametrized(module, "weight")
    return is_parametrized and isinstance(module.get_submodule("parametrizations.weight.0"), WeightStep | CodedStep)


def steps(prepared: nn.Module) -> list[nn.Parameter]:
    """The learned steps of a network that `prepare` made; all its other parameters are those of the float network."""
    modules = [*prepared.modules()]
    coded = [module.log_step for module in modules if isinstance(module, CodedStep)]
    return [*coded, *(module.step for module in modules if isinstance(module, WeightStep | InputStep))]


def rate(prepared: nn.Module) -> CodedBits:
    """`coded_bits` of a network that was prepared for a `weight_rate`."""
    weights = (module for module in prepared.modules() if isinstance(module, parametrize.ParametrizationList))
    return coded_bits([(weight[0], weight.original) for weight in weights if isinstance(weight[0], CodedStep)])


class WeightStep(nn.Module):
    """A parametrization of weights (N, ...) with one learned `step` and one fixed zero point for each of N channels."""

    zero_point: Tensor

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        grid = mse_grid(weight.detach().flatten(1).float(), 2**bits)
        self.step = nn.Parameter(grid.scale)
        self.register_buffer("zero_point", grid.zero_point)

    def forward(self, weight: Tensor) -> Tensor:
        low, high = self._range(weight)
        scale = (weight[0].numel() * (2 ** (self.bits - 1))) ** -0.5
        return fake_quantize(weight, per_channel(self.step, weight), low, high, scale)

    def codes(self, weight: Tensor, name: str) -> tuple[Tensor, Grid, int]:
        """Codes (N, ...), grid and bits of `weight`, exactly those that `forward` multiplies out."""
        check_finite(name, weight, self.step)
        low, high = self._range(weight)
        step = positive(self.step.detach().float())
        codes = (weight.float() / per_channel(step, weight)).clamp(low, high).round() - low
        return codes.to(code_dtype(2**self.bits)), Grid(step, self.zero_point.clone(), 2**self.bits), self.bits

    def _range(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        low = per_channel(-self.zero_point.float(), weight)
        return low, low + 2**self.bits - 1


class InputStep(nn.Module):
    """Fake quantization of a layer's input with one learned `step`, set by the first batch in training mode.

    That batch also decides whether the grid is one-sided, which it is where there are no negative values. Until then,
    inputs pass unchanged.
    """

    zero_point: Tensor
    started: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.step = nn.Parameter(torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self._has_started = False

    def forward(self, x: Tensor) -> Tensor:
        if not self._has_started:
            if not bool(self.started):
                if not self.training:
                    return x
                self._start(x.detach().float())
            # Reading the buffer in every step would make a GPU wait.
            self._has_started = True
        low = -self.zero_point.float()
        # Per image, so that the share of a step in the loss does not depend on the size of the batch.
        scale = (x[0].numel() * 2 ** (self.bits - 1)) ** -0.5
        return fake_quantize(x, self.step, low, low + 2**self.bits - 1, scale)

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        # Of several processes that train together each sees a part of the batch.
        negative, magnitude = mean_of_processes(torch.stack([(x < 0).any().to(x.dtype), x.abs().mean()]))
        signed = bool(negative > 0)
        self.zero_point.fill_(2 ** (self.bits - 1) if signed else 0)
        highest = 2 ** (self.bits - 1) - 1 if signed else 2**self.bits - 1
        step = 2 * magnitude / highest**0.5
        self.step.fill_(step if step > 0 else 1.0)
        self.started.fill_(True)

    def fixed(self, name: str) -> InputQuantizer:
        """The grid as it is now."""
        if not torch.isfinite(self.step):
            raise UserError(f"{name}: found a step of its input that is not finite; training has diverged")
        return InputQuantizer(positive(self.step.detach().float()), self.zero_point, 2**self.bits)


def _times(gain: Tensor, codes: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """Codes and grid of the values times `gain` (N,), float64: mirrored where it is negative, zero where it is zero."""
    top = grid.levels - 1
    mirrored = gain < 0
    zero_point = torch.where(mirrored, top - grid.zero_point, grid.zero_point)
    codes = torch.where(per_channel(mirrored, codes), top - codes, codes)
    scale = (grid.scale.double() * gain.abs()).to(grid.scale.dtype)
    vanished = scale == 0
    codes = torch.where(per_channel(vanished, codes), per_channel(zero_point, codes).to(codes.dtype), codes)
    return codes, Grid(torch.where(vanished, 1.0, scale), zero_point, grid.levels)
