"""Post-training quantization of the weights of a trained network: one call, no training, a few hundred images."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from compress.errors import UserError
from compress.models.canonical import Layer, layer_of
from compress.models.inference import full_float32
from compress.quantization.activations import attach_input_quantizer
from compress.quantization.batch_norm import match_output_statistics, move_statistics
from compress.quantization.biases import round_bias
from compress.quantization.calibration import CalibrationBatches, walk
from compress.quantization.grid import Grid
from compress.quantization.layer import corrected_bias, layer_moments, solve_layer
from compress.quantization.options import Options, Progress, silent
from compress.quantization.preparation import Prepared, prepare
from compress.quantization.quantized import (
    SMALLEST,
    QuantizedLayer,
    QuantizedModel,
    float_state,
    in_half,
    set_weight,
    share_weights,
)


def quantize(
    model: nn.Module,
    calibration_batches: CalibrationBatches,
    bits: int | Mapping[str, int],
    *,
    progress: Progress = silent,
    **options: Any,
) -> QuantizedModel:
    """Quantize the weight of every Conv1d, Conv2d and Linear of `model`, and of transposed ones; it is not changed.

    It is done on a canonical copy, see `compress.models.canonical`, so that subclasses of these, weights computed from
    parameters and functions that multiply a parameter count as such layers too.

    calibration_batches: images as the model takes them, normalised: tensors (B, ...) or (images, labels) pairs.
    bits: 1 to 16, or such a number for each layer that is quantized. options: the fields of `Options`.

    Raises UserError for a value out of range, a pattern in `skip` that matches no layer, a model that cannot be traced
    or leaves nothing to quantize, and for weights or activations that are not finite.
    """
    return quantize_with(Options(**options), model, calibration_batches, bits, progress)


@full_float32()
def quantize_with(
    options: Options,
    model: nn.Module,
    calibration_batches: CalibrationBatches,
    bits: int | Mapping[str, int],
    progress: Progress = silent,
) -> QuantizedModel:
    """`quantize` with `options` that exist."""
    prepared = prepare(model, calibration_batches, options.skip)
    widths = prepared.widths(bits, options.first_last_bits)

    def answer(name: str, layer: Layer, quantized: list[Tensor], analog: list[Tensor]) -> Answer:
        moments = layer_moments(layer, quantized, analog, options, name)
        return Answer(*solve_layer(layer, moments, widths[name], options, name), widths[name])

    return quantize_prepared(prepared, options, answer, progress)


# Of the error that the codes make; errors add up as squares, so that this is a few thousandths.
FELT = 0.05


class Answer(NamedTuple):
    """What is found for one layer; `bits`: see `QuantizedLayer`."""

    codes: Tensor
    grid: Grid
    bias: Tensor | None
    bits: float
    sensitivity: float | None = None


# Called as answer(name, float layer, its inputs in the quantized network, and in the float one), in execution order.
AnswerLayer = Callable[[str, Layer, list[Tensor], list[Tensor]], Answer]


def quantize_prepared(
    prepared: Prepared, options: Options, answer: AnswerLayer, progress: Progress = silent
) -> QuantizedModel:
    """The prepared network with every layer as `answer` has it, and inputs quantized if `options` say so."""
    layers = _Layers(prepared, options, answer, progress)
    norms = prepared.norms() if options.correction.batch_norm else []
    order = [*prepared.order, *prepared.choice.tied, *norms]
    errors = walk(prepared.analog, layers.quantized, prepared.graph, prepared.images, order, layers.solve)
    solved = {
        name: QuantizedLayer(one.codes, one.grid, one.bits, errors[name], one.sensitivity)
        for name, one in layers.solved.items()
    }
    tied = prepared.choice.tied
    state = float_state(layers.quantized, [*solved, *tied])
    return QuantizedModel(layers.quantized, solved, state, prepared.folded, prepared.choice.skipped, tied)


def _shortened(found: Answer, target: Layer, layer: Layer, quantized: Tensor, analog: Tensor) -> Answer:
    """`found` with its scales and its bias rounded to float16, which a file keeps in 2 bytes, unless it is felt.

    target: the layer that becomes the quantized one, layer: the float one, each with a batch of its inputs.
    """
    rounded = _in_half(found)
    if rounded is None:
        return found
    outputs = []
    for answer in (found, rounded):
        set_weight(target, answer.codes, answer.grid, answer.bias)
        outputs.append(target(quantized))
    error, added = (float((output - outputs[0]).norm()) for output in (layer(analog), outputs[1]))
    return rounded if added <= FELT * error else found


def _in_half(found: Answer) -> Answer | None:
    """The answer with scales and bias of float16; None: not all of them are in its range."""
    scale = in_half(found.grid.scale, least=SMALLEST)
    bias = None if found.bias is None else in_half(found.bias)
    if scale is None or (bias is None and found.bias is not None):
        return None
    return found._replace(grid=Grid(scale, found.grid.zero_point, found.grid.levels), bias=bias)


class _Layers:
    """Solves the layers of one network as the walk reaches them; `quantized` is the network so far."""

    def __init__(self, prepared: Prepared, options: Options, answer: AnswerLayer, progress: Progress) -> None:
        self.prepared, self.options, self.answer, self.progress = prepared, options, answer, progress
        self.input_bits: dict[str, int] = {}
        if options.activation_bits is not None:
            first_last_bits = options.first_last_bits and min(options.first_last_bits, 8)
            self.input_bits = prepared.widths(options.activation_bits, first_last_bits)
        self.folded = {name for name, _ in prepared.folded}
        self.quantized = copy.deepcopy(prepared.analog)
        self.repeated = prepared.repeated()
        self.solved: dict[str, Answer] = {}

    def solve(self, name: str, quantized_inputs: list[Tensor], analog_inputs: list[Tensor]) -> None:
        norm = self.quantized.get_submodule(name)
        if isinstance(norm, nn.BatchNorm2d):
            move_statistics(norm, quantized_inputs, analog_inputs)
            return
        target, layer = layer_of(self.quantized, name), layer_of(self.prepared.analog, name)
        holder = self.prepared.choice.tied.get(name, name)
        if holder in self.input_bits:
            quantized_inputs = self._quantize_inputs(target, holder, quantized_inputs)
        if holder != name:
            self._share(name, holder, quantized_inputs, analog_inputs)
            return
        again = self.repeated.get(name, [])
        # What is one tensor in both lists counts as an input that nothing before has changed.
        changed = again if quantized_inputs is analog_inputs else [batch[:] for batch in again]
        found = self.answer(name, layer, quantized_inputs + changed, analog_inputs + again)
        set_weight(target, found.codes, found.grid, found.bias)
        if self.options.correction.batch_norm and name in self.folded:
            outputs = [layer(batch) for batch in analog_inputs]
            changes = [target(batch) for batch in quantized_inputs]
            grid, bias = match_output_statistics(target, found.grid, changes, outputs)
            found = found._replace(grid=grid, bias=bias)
        self.solved[name] = found = _shortened(found, target, layer, quantized_inputs[0], analog_inputs[0])
        set_weight(target, found.codes, found.grid, found.bias)
        round_bias(target, found.grid)
        self.progress(len(self.solved), len(self.prepared.order), f"{found.bits:.3g} bit  {name}")

    def _share(self, name: str, holder: str, quantized: list[Tensor], analog: list[Tensor]) -> None:
        """Gives the layer `name` the weight of `holder`, which is solved, and a bias for its own inputs."""
        layer, target = layer_of(self.prepared.analog, name), layer_of(self.quantized, name)
        share_weights(self.quantized, {name: holder})
        if self.options.correction.bias:
            moments = self.options.grams.moments(layer, quantized, analog, centre=True)
            target.bias = nn.Parameter(corrected_bias(layer, target.weight, moments), requires_grad=False)
        round_bias(target, self.solved[holder].grid)

    def _quantize_inputs(self, target: Layer, name: str, inputs: list[Tensor]) -> list[Tensor]:
        inputs_and_later = inputs + self.repeated.get(name, [])
        if not all(bool(batch.isfinite().all()) for batch in inputs_and_later):
            raise UserError(f"{name}: found inputs that are not finite on the calibration images")
        grid = self.options.activations.calibrate(inputs_and_later, self.input_bits[name])
        attach_input_quantizer(target, grid)
        return [grid(batch) for batch in inputs]
