"""Post-training quantization of the weights of a trained network: one call, no training, a few hundred images."""

import copy
import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import Graph

from compress.errors import UserError
from compress.quantization.calibration import gather, walk
from compress.quantization.fold import bake_parametrizations, find_foldable, fold_pairs, trace
from compress.quantization.grid import Grid, max_abs_grid, mse_grid, percentile_grid
from compress.quantization.layer import solve_layer
from compress.quantization.patches import Moments
from compress.quantization.refinement import Refinement
from compress.quantization.solvers import gpfq

SCALES = {"mse": mse_grid, "max_abs": max_abs_grid, "percentile": percentile_grid}


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer's weight: integer `codes` in the weight's own `shape` (N, ...) on `grid`, asked for at `bits` bits.

    `error` is |Y~ - Y| / |Y - b|, of the layer's outputs on the calibration images, errors of earlier layers included;
    None where the network was trained on its grids.
    """

    codes: Tensor
    grid: Grid
    shape: tuple[int, ...]
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


def quantize(
    model: nn.Module,
    calibration_batches: Iterable,
    bits: int,
    *,
    solver: Callable[..., Tensor] = gpfq,
    scale: Literal["mse", "max_abs", "percentile"] = "mse",
    levels: int | Literal["published"] | None = None,
    first_last_bits: int | None = 8,
    skip: Sequence[str] = (),
    gram_dtype: torch.dtype = torch.float32,
    block_size: int = 128,
    bias_correction: bool = True,
    refine: Refinement | None = None,
    percentile: float = 1.0,
    alphabet_scalar: float = 1.16,
    progress: Callable[[int, int, str, int], None] | None = None,
) -> QuantizedModel:
    """Quantize the weight of every Conv2d and Linear of `model`, which is left untouched.

    calibration_batches: images as the model takes them, normalised: tensors (B, ...) or (images, labels) pairs.
    bits: 1 to 16; 2^bits levels, or `levels` many; "published" is the 2^bits + 1 of the published GPFQ code.
    solver: (weight (N, d), gram, cross, grid, block_size=) -> codes (N, d), as in compress.quantization.solvers.
    scale: how each layer's grid is chosen; percentile and alphabet_scalar belong to "percentile".
    first_last_bits: bits of the first and last Conv2d or Linear in execution order (skipped or not); None: `bits`.
    skip: names or globs of layers that stay float.
    bias_correction: centre the Grams and move the mean output error into the bias.
    refine: searched scales and coordinate descent, for a solver that reads inputs; None: neither.
    progress: called as progress(done, total, layer name, its bits) after each layer.

    Raises UserError for a value out of range, a pattern in `skip` that matches no layer, a model that cannot be traced
    or leaves nothing to quantize, and for weights or activations that are not finite.
    """
    for key, value in (("bits", bits), ("first_last_bits", first_last_bits)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 16):
            raise UserError(f"{key}: found {value!r}; accepted: a whole number from 1 to 16")
    if levels not in (None, "published") and not (type(levels) is int and 2 <= levels <= 2**16 + 1):
        raise UserError(f"levels: found {levels!r}; accepted: a whole number from 2 to {2**16 + 1}, or published")
    if scale not in SCALES:
        raise UserError(f"scale: found {scale!r}; accepted: {', '.join(SCALES)}")
    choose = SCALES[scale]
    if scale == "percentile":
        choose = partial(choose, percentile=percentile, scalar=alphabet_scalar)

    analog = bake_parametrizations(copy.deepcopy(model).eval())
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in analog.parameters()):
        analog = analog.float()
    folded = find_foldable(analog)
    fold_pairs(analog, folded)
    graph = trace(analog)
    order, skipped = choose_layers(analog, graph, skip)
    bits_of = dict.fromkeys(order, bits)
    levels_of = dict.fromkeys(order, levels if isinstance(levels, int) else _levels(bits, levels))
    if first_last_bits is not None:
        for name in {order[0], order[-1]} if order else ():
            bits_of[name], levels_of[name] = first_last_bits, _levels(first_last_bits, levels)
    order = [name for name in order if name not in skipped]
    check_any_left(analog, order, skipped)

    quantized = copy.deepcopy(analog)
    reads_inputs = getattr(getattr(solver, "func", solver), "reads_inputs", True)
    found: dict[str, tuple[Tensor, Grid]] = {}

    def solve(name: str, quantized_inputs: list[Tensor], analog_inputs: list[Tensor]) -> None:
        layer, target = analog.get_submodule(name), quantized.get_submodule(name)
        if not bool(torch.isfinite(layer.weight).all()):
            raise UserError(f"{name}: found a weight with values that are not finite")
        moments = None
        if reads_inputs or bias_correction or scale == "mse":
            moments = Moments(layer, gram_dtype, centre=bias_correction)
            for mine, other in zip(quantized_inputs, analog_inputs, strict=True):
                moments.update(mine, other)
        codes, grid, bias = solve_layer(
            layer,
            moments,
            levels=levels_of[name],
            name=name,
            choose=choose,
            solver=partial(solver, block_size=block_size),
            reads_inputs=reads_inputs,
            bias_correction=bias_correction,
            refine=refine,
        )
        found[name] = codes, grid
        target.weight = nn.Parameter(grid.dequantize(codes), requires_grad=layer.weight.requires_grad)
        if bias is not None:
            target.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
        if progress is not None:
            progress(len(found), len(order), name, bits_of[name])

    reference = analog.get_submodule(order[0]).weight
    batches = gather(calibration_batches, reference.device, reference.dtype)
    errors = walk(analog, quantized, graph, batches, order, solve)
    layers = {
        name: QuantizedLayer(codes, grid, tuple(codes.shape), bits_of[name], errors[name])
        for name, (codes, grid) in found.items()
    }
    return QuantizedModel(quantized, layers, state_beside(quantized, layers), folded, skipped)


def state_beside(model: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    """The state dict of `model` without the weights of `layers` and without BatchNorm's step counters."""
    weights = {f"{name}.weight" for name in layers}
    return {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if name not in weights and not name.endswith("num_batches_tracked")
    }


def _levels(bits: int, levels: int | str | None) -> int:
    return 2**bits + (levels == "published")


def check_layers(model: nn.Module, skip: Sequence[str]) -> None:
    """Raises, without quantizing, the UserErrors that `quantize` has for a model and its `skip`."""
    order, skipped = choose_layers(model, trace(model), skip)
    check_any_left(model, [name for name in order if name not in skipped], skipped)


def check_any_left(model: nn.Module, order: Sequence[str], skipped: Mapping[str, str]) -> None:
    if not order:
        raise UserError(f"{type(model).__name__}: no layer left to quantize ({len(skipped)} stay float)")


def choose_layers(model: nn.Module, graph: Graph, patterns: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(names of all layers that can be quantized, in execution order; why each of the others stays float).

    A layer that `patterns` exclude is in both. `graph` is that of `model`.
    """
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    named = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    skipped = {}
    for name, module in named.items():
        if type(module) not in (nn.Conv2d, nn.Linear):
            skipped[name] = f"is a {type(module).__name__}, which is not a plain Conv2d or Linear"
        elif calls[name] != 1:
            skipped[name] = f"is called {calls[name]} times" if calls[name] else "is never called on its own"
    order = [name for name in calls if name in named and name not in skipped]
    for pattern in patterns:
        matches = fnmatch.filter(named, pattern)
        if not matches:
            raise UserError(f"skip: found {pattern!r}, which matches no layer; accepted: {', '.join(named)}")
        skipped.update((name, f"skip: {pattern}") for name in matches if name not in skipped)
    return order, skipped
