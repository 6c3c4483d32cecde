"""What a width of one layer costs the logits, and the cheapest widths of all layers for a number of bytes.

Errors of layers cannot be compared with each other, since some matter more to the result, so a layer's cost at a width
is the divergence KL(p || p~) between the classes that the float network predicts on calibration images and those that
it predicts with this layer alone quantized. The sum over the layers is what `allocate` minimises.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.models.canonical import layer_of
from compress.quantization.activations import InputQuantizer, attach_input_quantizer
from compress.quantization.allocation import allocate
from compress.quantization.calibration import CalibrationBatches, walk
from compress.quantization.layer import layer_moments, solve_layer
from compress.quantization.options import Options, Progress, silent
from compress.quantization.preparation import Prepared, prepare
from compress.quantization.quantized import QuantizedLayer, QuantizedModel, float_state, set_weight, share_weights

# `answers[name][bits]`: the layer so quantized, on the inputs that it has in the float network, and its bias.
QuantizedCandidates = dict[str, dict[int, tuple[QuantizedLayer, Tensor | None]]]


@dataclass(frozen=True)
class Sensitivities:
    """Every layer at every width it may have.

    `divergence[name][bits]` is in nats, the mean over images. A layer with a single width has no divergence (0).
    """

    prepared: Prepared
    answers: QuantizedCandidates
    divergence: dict[str, dict[int, float]]
    activation_bits: int | None

    def smallest(self) -> dict[str, int]:
        """The lowest width of each layer."""
        return {name: min(widths) for name, widths in self.answers.items()}

    def largest(self) -> dict[str, int]:
        """The highest width of each layer."""
        return {name: max(widths) for name, widths in self.answers.items()}

    def model(self, bits: Mapping[str, int]) -> QuantizedModel:
        """The network with every layer as it was answered alone: good for its size, not for its accuracy."""
        quantized = copy.deepcopy(self.prepared.analog)
        layers = {}
        for name, width in bits.items():
            layers[name], bias = self.answers[name][width]
            set_weight(layer_of(quantized, name), layers[name].codes, layers[name].grid, bias)
            if self.activation_bits is not None:
                grid = InputQuantizer(1.0, 0, 2**self.activation_bits)
                attach_input_quantizer(quantized.get_submodule(name), grid)
        choice = self.prepared.choice
        share_weights(quantized, choice.tied)
        state = float_state(quantized, [*layers, *choice.tied])
        return QuantizedModel(quantized, layers, state, self.prepared.folded, choice.skipped, choice.tied)

    def within(self, budget: int, layer_bytes: Callable[[QuantizedLayer], int]) -> dict[str, int] | None:
        """The widths of least divergence whose layers take at most `budget` bytes in all; None: there are none."""
        widths = {name: sorted(answers) for name, answers in self.answers.items()}
        costs = [[self.divergence[name][bits] for bits in choices] for name, choices in widths.items()]
        sizes = [[layer_bytes(self.answers[name][bits][0]) for bits in choices] for name, choices in widths.items()]
        chosen = allocate(costs, sizes, budget)
        if chosen is None:
            return None
        return {name: choices[index] for (name, choices), index in zip(widths.items(), chosen, strict=True)}


@torch.no_grad()
def measure_sensitivities(
    model: nn.Module,
    calibration_batches: CalibrationBatches,
    widths: Sequence[int],
    options: Options,
    *,
    images: int = 128,
    progress: Progress = silent,
) -> Sensitivities:
    """Quantizes each layer alone to each of `widths`; the first and the last only to `first_last_bits`, if given.

    images: of the calibration images, those that the divergence is measured on. Each width of a layer costs a solve and
    a forward pass of `images`.
    """
    prepared = prepare(model, calibration_batches, options.skip)
    inner = sorted(set(widths))
    outer = inner if options.first_last_bits is None else [options.first_last_bits]
    choices = {name: outer if name in prepared.outer else inner for name in prepared.order}
    total = 2 * sum(map(len, choices.values()))
    step = count(1)

    def tell(what: str) -> None:
        progress(next(step), total, what)

    answers = _answer(prepared, choices, options, tell)
    sample = [part.clone() for part in torch.cat(prepared.images)[:images].split(len(prepared.images[0]))]
    divergence = _diverge(prepared, sample, answers, tell)
    return Sensitivities(prepared, answers, divergence, options.activation_bits)


def _answer(
    prepared: Prepared,
    choices: Mapping[str, Sequence[int]],
    options: Options,
    tell: Callable[[str], None],
) -> QuantizedCandidates:
    """Every layer at each of its `choices` of widths."""
    answers: QuantizedCandidates = {name: {} for name in prepared.order}
    repeated = prepared.repeated()

    def solve(name: str, _: list[Tensor], inputs: list[Tensor]) -> None:
        layer = layer_of(prepared.analog, name)
        inputs = inputs + repeated.get(name, [])
        moments = layer_moments(layer, inputs, inputs, options, name)
        for bits in choices[name]:
            codes, grid, bias = solve_layer(layer, moments, bits, options, name)
            answers[name][bits] = QuantizedLayer(codes, grid, bits, None), bias
            tell(f"trying {bits} bit  {name}")

    walk(prepared.analog, copy.deepcopy(prepared.analog), prepared.graph, prepared.images, prepared.order, solve)
    return answers


def _diverge(
    prepared: Prepared, images: Sequence[Tensor], answers: QuantizedCandidates, tell: Callable[[str], None]
) -> dict[str, dict[int, float]]:
    """The divergence of the predictions for `images` with each layer alone replaced by each of its answers."""
    analog = prepared.analog
    reference = _log_probabilities(analog, images)
    divergence: dict[str, dict[int, float]] = {name: {} for name in answers}
    for name, choices in answers.items():
        layer = layer_of(analog, name)
        weight, bias = layer.weight, layer.bias
        for bits, (answer, new_bias) in choices.items():
            tell(f"measuring {bits} bit  {name}")
            if len(choices) == 1:
                divergence[name][bits] = 0.0
                continue
            set_weight(layer, answer.codes, answer.grid, new_bias)
            share_weights(analog, prepared.choice.tied)
            changed = _log_probabilities(analog, images)
            divergence[name][bits] = F.kl_div(changed, reference, reduction="batchmean", log_target=True).item()
            layer.weight, layer.bias = weight, bias
            share_weights(analog, prepared.choice.tied)
    return divergence


def _log_probabilities(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    # Layers that work in place must not reach the images.
    return torch.cat([model(batch.clone()).double() for batch in batches]).log_softmax(1)
