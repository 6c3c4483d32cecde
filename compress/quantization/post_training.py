"""Post-training quantization of the weights of a trained network: one call, no training, a few hundred images."""

import copy
import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Graph

from compress.errors import UserError
from compress.models.folding import bake_parametrizations, find_foldable, fold_pairs, trace
from compress.models.masks import is_mask
from compress.quantization.activations import Range, attach_input_quantizer, calibrated
from compress.quantization.batch_norm import matched, move_statistics
from compress.quantization.calibration import gather, walk
from compress.quantization.grid import Grid, ZeroPoint, max_abs_grid, mse_grid, one_for_the_layer, percentile_grid
from compress.quantization.layer import solve_layer
from compress.quantization.patches import Moments, row_count, spread
from compress.quantization.refinement import Refinement
from compress.quantization.solvers import gpfq

PLAIN = "plain Conv2d or Linear"
NAMED = 3  # layers that a message lists before it only counts
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
    bits: int | Mapping[str, int],
    *,
    activation_bits: int | None = None,
    skip: Sequence[str] = (),
    progress: Callable[[int, int, str, int], None] | None = None,
    **options: Any,
) -> QuantizedModel:
    """Quantize the weight of every Conv2d and Linear of `model`, which is left untouched.

    calibration_batches: images as the model takes them, normalised: tensors (B, ...) or (images, labels) pairs.
    bits: 1 to 16, or such a number for each layer that is quantized.
    activation_bits: 2 to 8, of the inputs of the same layers, one scale a layer; None: float inputs.
    skip: names or globs of layers that stay float.
    progress: called as progress(done, total, layer name, its bits) after each layer.
    options: those of `Options`, which say how.

    Raises UserError for a value out of range, a pattern in `skip` that matches no layer, a model that cannot be traced
    or leaves nothing to quantize, and for weights or activations that are not finite.
    """
    how = Options(**options)
    prepared = prepare(model, skip)
    bits_of = prepared.widths(bits, how.first_last_bits)
    inputs_of = prepared.widths(activation_bits, how.first_last_bits and min(how.first_last_bits, 8))
    analog, quantized = prepared.analog, copy.deepcopy(prepared.analog)
    found: dict[str, tuple[Tensor, Grid]] = {}

    norms = prepared.norms() if how.batch_norm_reestimation else []
    matching = {name for name, _ in prepared.folded} if how.batch_norm_reestimation else set()

    def solve(name: str, quantized_inputs: list[Tensor], analog_inputs: list[Tensor]) -> None:
        target = quantized.get_submodule(name)
        if name in norms:
            move_statistics(target, quantized_inputs, analog_inputs)
            return
        if inputs_of[name] is not None:
            if not all(bool(each.isfinite().all()) for each in quantized_inputs):
                raise UserError(f"{name}: found inputs that are not finite on the calibration images")
            grid = calibrated(quantized_inputs, inputs_of[name], how.activation_range, how.activation_percentile)
            attach_input_quantizer(target, grid)
            quantized_inputs = [grid(each) for each in quantized_inputs]
        outer = how.first_last_bits is not None and name in (prepared.all_layers[0], prepared.all_layers[-1])
        layer = analog.get_submodule(name)
        moments = how.moments(layer, quantized_inputs, analog_inputs, name)
        codes, grid, bias = how.answer(layer, moments, how.levels_of(bits_of[name], outer), name)
        put(target, codes, grid, bias)
        if name in matching:
            outputs = [layer(each) for each in analog_inputs]
            grid, bias = matched(target, grid, [target(each) for each in quantized_inputs], outputs)
            put(target, codes, grid, bias)
        found[name] = codes, grid
        if progress is not None:
            progress(len(found), len(prepared.order), name, bits_of[name])

    batches = prepared.gather(calibration_batches)
    errors = walk(analog, quantized, prepared.graph, batches, [*prepared.order, *norms], solve)
    layers = {
        name: QuantizedLayer(codes, grid, tuple(codes.shape), bits_of[name], errors[name])
        for name, (codes, grid) in found.items()
    }
    return QuantizedModel(quantized, layers, state_beside(quantized, layers), prepared.folded, prepared.skipped)


def put(layer: nn.Module, codes: Tensor, grid: Grid, bias: Tensor | None) -> None:
    """Gives `layer` the weight that `codes` stand for, and its bias."""
    trained = layer.weight.requires_grad
    layer.weight = nn.Parameter(grid.dequantize(codes), requires_grad=trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=trained)


@dataclass(frozen=True)
class Options:
    """How `quantize` answers one layer.

    solver: (weight (N, d), gram, cross, grid, block_size=) -> codes (N, d), as in compress.quantization.solvers.
    scale: how each layer's grid is chosen; percentile and alphabet_scalar belong to "percentile".
    zero_point: of the grids that "mse" chooses, see `mse_grid`. granularity: a scale per output channel, or per layer.
    levels: 2^bits where None, "published" 2^bits + 1, as in the authors' code, "narrow" 2^bits - 1; or a number.
    first_last_bits: bits of the first and last Conv2d or Linear in execution order (skipped or not); None: as the rest.
    activation_range, activation_percentile: see `compress.quantization.activations.calibrated`.
    max_rows: patches of a layer that its Grams are made of, evenly spread; None: all.
    bias_correction: centre the Grams and move the mean output error into the bias.
    batch_norm_reestimation: see `compress.quantization.batch_norm`; it needs a scale per channel.
    refine: searched scales and coordinate descent, for a solver that reads inputs; None: neither.
    """

    solver: Callable[..., Tensor] = gpfq
    scale: Literal["mse", "max_abs", "percentile"] = "mse"
    zero_point: ZeroPoint = "mirrored"
    granularity: Literal["channel", "layer"] = "channel"
    levels: int | Literal["published", "narrow"] | None = None
    first_last_bits: int | None = 8
    gram_dtype: torch.dtype = torch.float32
    max_rows: int | None = None
    block_size: int = 128
    bias_correction: bool = True
    batch_norm_reestimation: bool = False
    refine: Refinement | None = None
    percentile: float = 1.0
    alphabet_scalar: float = 1.16
    activation_range: Range = "mse"
    activation_percentile: float = 0.9999

    def __post_init__(self) -> None:
        _check_bits("first_last_bits", self.first_last_bits, 1, 16)
        levels = self.levels
        if levels not in (None, "published", "narrow") and not (type(levels) is int and 2 <= levels <= 2**16 + 1):
            raise UserError(
                f"levels: found {levels!r}; accepted: a whole number from 2 to {2**16 + 1}, published or narrow"
            )
        if self.batch_norm_reestimation and self.granularity == "layer":
            raise UserError("batch_norm_reestimation: found true with one scale a layer; accepted: granularity channel")
        if self.refine not in (None, Refinement()) and not self._reads_inputs:
            raise UserError(
                "quantizer.sweeps: found sweeps, scale_candidates or refit for a solver that reads no inputs; "
                "accepted: 0, 1 and false, or another quantizer"
            )
        if self.scale not in SCALES:
            raise UserError(f"scale: found {self.scale!r}; accepted: {', '.join(SCALES)}")

    def levels_of(self, bits: int, outer: bool = False) -> int:
        """Levels of a layer's grid; `outer`: of one that has `first_last_bits`, which a number of levels is not for."""
        if isinstance(self.levels, int):
            return 2**bits if outer else self.levels
        # One bit without its lowest code would be a single level.
        return max(2, 2**bits + {None: 0, "published": 1, "narrow": -1}[self.levels])

    def choose(self) -> Callable[..., Grid]:
        """The rule (weight (N, d), levels, importance) -> grid."""
        rule = SCALES[self.scale]
        if self.scale == "percentile":
            rule = partial(rule, percentile=self.percentile, scalar=self.alphabet_scalar)
        if self.scale == "mse":
            rule = partial(rule, zero_point=self.zero_point)
        return one_for_the_layer(rule) if self.granularity == "layer" else rule

    def moments(self, layer: nn.Module, quantized: list[Tensor], analog: list[Tensor], name: str) -> Moments | None:
        """Those of a float `layer`, given its inputs in both networks, a tensor for each batch; None: not needed."""
        if not bool(torch.isfinite(layer.weight).all()):
            raise UserError(f"{name}: found a weight with values that are not finite")
        if not (self._reads_inputs or self.bias_correction or self.scale == "mse"):
            return None
        rows = sum(row_count(layer, each) for each in quantized)
        every = 1 if self.max_rows is None else spread(-(-rows // self.max_rows), row_count(layer, quantized[0][:1]))
        moments = Moments(layer, self.gram_dtype, centre=self.bias_correction, every=every)
        for mine, other in zip(quantized, analog, strict=True):
            moments.update(mine, other)
        return moments

    def answer(
        self, layer: nn.Module, moments: Moments | None, levels: int, name: str
    ) -> tuple[Tensor, Grid, Tensor | None]:
        """Codes, grid and bias of a float `layer` on a grid of so many levels, from the `moments` of its inputs."""
        refine = self.refine
        if refine is not None and self.granularity == "layer":
            refine = replace(refine, shared=True)
        return solve_layer(
            layer,
            moments,
            levels=levels,
            name=name,
            choose=self.choose(),
            solver=partial(self.solver, block_size=self.block_size),
            reads_inputs=self._reads_inputs,
            bias_correction=self.bias_correction,
            refine=refine,
        )

    @property
    def _reads_inputs(self) -> bool:
        return getattr(getattr(self.solver, "func", self.solver), "reads_inputs", True)


@dataclass(frozen=True)
class Prepared:
    """A float copy of a network, folded and traced: `all_layers` and, without the `skipped`, `order`, as executed."""

    analog: nn.Module
    graph: Graph
    all_layers: list[str]
    order: list[str]
    skipped: dict[str, str]
    folded: list[tuple[str, str]]

    def widths(self, bits: int | Mapping[str, int] | None, first_last: int | None) -> dict[str, int | None]:
        """Bits of each layer: its own where `bits` is a mapping, else `bits` or what the first and last one have."""
        if isinstance(bits, Mapping):
            missing = next((name for name in self.order if name not in bits), None)
            if missing:
                raise UserError(f"bits: found none for {missing}; accepted: a width for each layer")
            for name in self.order:
                _check_bits(f"bits.{name}", bits[name], 1, 16)
            return {name: bits[name] for name in self.order}
        _check_bits("bits", bits, 1, 16)
        widths = dict.fromkeys(self.all_layers, bits)
        if first_last is not None and bits is not None:
            widths |= dict.fromkeys((self.all_layers[0], self.all_layers[-1]), first_last)
        return {name: widths[name] for name in self.order}

    def norms(self) -> list[str]:
        """The batch norms that could not be folded."""
        return [name for name, module in self.analog.named_modules() if isinstance(module, nn.BatchNorm2d)]

    def gather(self, batches: Iterable) -> list[Tensor]:
        """The calibration images on the network's device, in its type."""
        reference = self.analog.get_submodule(self.order[0]).weight
        return gather(batches, reference.device, reference.dtype)


def prepare(model: nn.Module, skip: Sequence[str] = ()) -> Prepared:
    """A copy of `model` ready for `walk`; raises UserError as `quantize` does."""
    analog = bake_parametrizations(copy.deepcopy(model).eval())
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in analog.parameters()):
        analog = analog.float()
    folded = find_foldable(analog)
    fold_pairs(analog, folded)
    graph = trace(analog)
    all_layers, skipped = choose_layers(analog, graph, skip)
    order = [name for name in all_layers if name not in skipped]
    check_any_left(analog, order, skipped)
    return Prepared(analog, graph, all_layers, order, skipped, folded)


def _check_bits(key: str, value: object, lowest: int, highest: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (whole and lowest <= value <= highest):
        raise UserError(f"{key}: found {value!r}; accepted: a whole number from {lowest} to {highest}")


def state_beside(model: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    """The state dict of `model` without the weights of `layers`, BatchNorm's step counters and masks."""
    weights = {f"{name}.weight" for name in layers}
    return {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if name not in weights and not name.endswith("num_batches_tracked") and not is_mask(name)
    }


def check_layers(model: nn.Module, skip: Sequence[str]) -> None:
    """Raises, without quantizing, the UserErrors that `quantize` has for a model and its `skip`."""
    order, skipped = choose_layers(model, trace(model), skip)
    check_any_left(model, [name for name in order if name not in skipped], skipped)


def check_any_left(model: nn.Module, order: Sequence[str], skipped: Mapping[str, str]) -> None:
    if not order:
        reasons = [f"{name} {reason}" for name, reason in skipped.items()]
        more = f", and {len(reasons) - NAMED} more" if len(reasons) > NAMED else ""
        listed = ", ".join(reasons[:NAMED]) + more if reasons else "it has none with weights"
        raise UserError(f"{type(model).__name__}: found no layer left to quantize ({listed}); accepted: {PLAIN}")


def choose_layers(model: nn.Module, graph: Graph, patterns: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(names of all layers that can be quantized, in execution order; why each of the others stays float).

    A layer that `patterns` exclude is in both. `graph` is that of `model`.
    """
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    named = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    skipped = {}
    for name, module in model.named_modules():
        matrices = any(each.dim() > 1 for each in module.parameters(recurse=False))
        if matrices and name not in named and type(module).__module__.startswith("torch.nn.modules."):
            skipped[name] = f"is a {type(module).__name__}, which is not a {PLAIN}"
    for name, module in named.items():
        if type(module) not in (nn.Conv2d, nn.Linear):
            skipped[name] = f"is a {type(module).__name__}, which is not a {PLAIN}"
        elif calls[name] != 1:
            skipped[name] = f"is called {calls[name]} times" if calls[name] else "is never called on its own"
    order = [name for name in calls if name in named and name not in skipped]
    for pattern in patterns:
        matches = fnmatch.filter(named, pattern)
        if not matches:
            raise UserError(f"skip: found {pattern!r}, which matches no layer; accepted: {', '.join(named)}")
        skipped.update((name, f"skip: {pattern}") for name in matches if name not in skipped)
    return order, skipped
