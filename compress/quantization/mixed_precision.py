"""A width of its own for each layer: what a width costs the logits, and the cheapest widths for a number of bytes.

Errors of layers cannot be compared with each other, since some matter more to the result, so a layer's cost at a width
is the divergence KL(p || p~) between the classes that the float network predicts on calibration images and those that
it predicts with this layer alone quantized. The sum over the layers is what `allocate` minimises.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.quantization.activations import InputQuantizer, attach_input_quantizer
from compress.quantization.allocation import allocate
from compress.quantization.calibration import walk
from compress.quantization.post_training import (
    Options,
    Prepared,
    QuantizedLayer,
    QuantizedModel,
    prepare,
    put,
    state_beside,
)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Choices:
    """Every layer at every width it may have.

    `answers[name][bits]` is the layer so quantized, on the inputs that it has in the float network, with its bias;
    `divergence[name][bits]` is in nats, the mean over images. A layer with a single width has no divergence (0).
    """

    prepared: Prepared
    answers: dict[str, dict[int, tuple[QuantizedLayer, Tensor | None]]]
    divergence: dict[str, dict[int, float]]
    activation_bits: int | None

    def smallest(self) -> dict[str, int]:
        """The lowest width of each layer."""
        return {name: min(own) for name, own in self.answers.items()}

    def largest(self) -> dict[str, int]:
        return {name: max(own) for name, own in self.answers.items()}

    def model(self, bits: Mapping[str, int]) -> QuantizedModel:
        """The network with every layer as it was answered alone: good for its size, not for its accuracy."""
        quantized = copy.deepcopy(self.prepared.analog)
        layers = {}
        for name, width in bits.items():
            layers[name], bias = self.answers[name][width]
            put(quantized.get_submodule(name), layers[name].codes, layers[name].grid, bias)
            if self.activation_bits is not None:
                grid = InputQuantizer(1.0, 0, 2**self.activation_bits)
                attach_input_quantizer(quantized.get_submodule(name), grid)
        float_state = state_beside(quantized, layers)
        return QuantizedModel(quantized, layers, float_state, self.prepared.folded, self.prepared.skipped)

    def within(self, budget: int, layer_bytes: Callable[[QuantizedLayer], int]) -> dict[str, int] | None:
        """The widths of least divergence whose layers take at most `budget` bytes in all; None: there are none."""
        widths = {name: sorted(own) for name, own in self.answers.items()}
        costs = [[self.divergence[name][bits] for bits in own] for name, own in widths.items()]
        sizes = [[layer_bytes(self.answers[name][bits][0]) for bits in own] for name, own in widths.items()]
        chosen = allocate(costs, sizes, budget)
        if chosen is None:
            return None
        return {name: own[index] for (name, own), index in zip(widths.items(), chosen, strict=True)}


@torch.no_grad()
def sensitivities(
    model: nn.Module,
    calibration_batches: Iterable,
    widths: Sequence[int],
    *,
    images: int = 128,
    activation_bits: int | None = None,
    skip: Sequence[str] = (),
    progress: Progress = lambda done, total, what: None,
    **options,
) -> Choices:
    """Quantizes each layer alone to each of `widths`; the first and the last only to `first_last_bits`, if given.

    images: of the calibration images, those that the divergence is measured on. The other arguments are those of
    `compress.quantization.quantize`. Each width of a layer costs a solve and a forward pass of `images`.
    """
    how = Options(**options)
    prepared = prepare(model, skip)
    analog, order = prepared.analog, prepared.order
    outer = {prepared.all_layers[0], prepared.all_layers[-1]} if how.first_last_bits is not None else set()
    choices = {name: [how.first_last_bits] if name in outer else sorted(set(widths)) for name in order}
    total = sum(len(own) for own in choices.values())
    answers: dict[str, dict[int, tuple[QuantizedLayer, Tensor | None]]] = {name: {} for name in order}
    done = 0

    def solve(name: str, _: list[Tensor], inputs: list[Tensor]) -> None:
        nonlocal done
        layer = analog.get_submodule(name)
        moments = how.moments(layer, inputs, inputs, name)
        for bits in choices[name]:
            codes, grid, bias = how.answer(layer, moments, how.levels_of(bits, name in outer), name)
            answers[name][bits] = QuantizedLayer(codes, grid, tuple(codes.shape), bits, None), bias
            done += 1
            progress(done, 2 * total, f"trying {bits} bit  {name}")

    batches = prepared.gather(calibration_batches)
    walk(analog, copy.deepcopy(analog), prepared.graph, batches, order, solve)
    seen = [part.clone() for part in torch.cat(batches)[:images].split(len(batches[0]))]
    reference = _log_probabilities(analog, seen)
    divergence: dict[str, dict[int, float]] = {name: {} for name in order}
    for name, own in answers.items():
        layer = analog.get_submodule(name)
        weight, bias = layer.weight, layer.bias
        for bits, (answer, new_bias) in own.items():
            done += 1
            progress(done, 2 * total, f"measuring {bits} bit  {name}")
            if len(own) == 1:
                divergence[name][bits] = 0.0
                continue
            put(layer, answer.codes, answer.grid, new_bias)
            found = _log_probabilities(analog, seen)
            divergence[name][bits] = F.kl_div(found, reference, reduction="batchmean", log_target=True).item()
            layer.weight, layer.bias = weight, bias
    return Choices(prepared, answers, divergence, activation_bits)


def _log_probabilities(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    # Layers that work in place must not reach the images.
    return torch.cat([model(batch.clone()).double() for batch in batches]).log_softmax(1)
