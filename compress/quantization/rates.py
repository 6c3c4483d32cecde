"""Networks of a rate: the coded bits of a quantized weight in the mean, first and last layer included.

Minimised is `divergence of the logits + price * bits`, with one price for the network. What a unit of output error of a
layer adds to the divergence is measured once (see `compress.quantization.logit_sensitivity`), which turns the price of
the network into that of each layer. The price for a rate is found on the way: each layer is solved at the price that is
predicted to spend the bits that are left on the layers that are left.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.models.canonical import Layer, layer_of
from compress.models.inference import full_float32
from compress.quantization.calibration import CalibrationBatches
from compress.quantization.layer import layer_moments, solve_layer_for_price
from compress.quantization.logit_sensitivity import LayerSensitivity, measure
from compress.quantization.options import Options, Progress, silent
from compress.quantization.post_training import Answer, quantize_prepared
from compress.quantization.preparation import prepare
from compress.quantization.quantized import QuantizedModel
from compress.quantization.rate_distortion import entropy, step_of

# Weights of a layer that its curve is made of, and the steps of the curve, in octaves of the weights' deviation.
SAMPLE, OCTAVES = 1 << 16, np.arange(-5.0, 6.0, 0.25)
# The deviation, in steps, of what path following adds to a weight for the errors before it, at a guess that fits, and
# at most so many times that of the weights.
CARRIED, MOST_CARRIED = 0.2, 0.8
# Prices that are told apart, by the octaves of the step that they give.
PRICES = np.arange(-40.0, 40.0, 0.02)
# The price of a layer is at most so many times that of the first one, or that less.
DRIFT = 1.25
# How near a rate is near enough, and how many walks it is worth.
NEAR, WALKS = 0.02, 4
# How many octaves a prediction is moved by where a layer took no bits at all.
EMPTY = 1.0
# A walk for at most so many times the bits of the one before, or that fewer, is for about as many.
ALIKE = 1.1


class RateControl:
    """The price for each layer, in units of divergence per bit, so that all of them take a number of bits together.

    Bits of a layer at a price are predicted by the entropy of its rounded weights: at that price or, after a walk, at
    the price at which they were what the layer took then, so many octaves of the step away.
    """

    def __init__(self, weights: Mapping[str, Tensor], sensitivities: Mapping[str, LayerSensitivity]) -> None:
        self.predicted = {name: _curve(weight, sensitivities[name]) for name, weight in weights.items()}
        self.shifts: dict[str, float] = {}
        self.alike: set[str] = set()  # the layers whose shift comes from a walk for about as many bits
        self.target = 0.0

    def start(self, bits: float) -> None:
        """From here on the layers are solved again, to take `bits` in all."""
        if not 1 / ALIKE < bits / (self.target or bits) < ALIKE:
            self.alike = set()
        self.target, self.left, self.remaining = bits, bits, dict.fromkeys(self.predicted)
        self.price = self.first = 0.0

    def price_of(self, name: str) -> float:
        """The price at which the layer `name`, the next, and all after it are predicted to take the bits left."""
        curves = [
            np.interp(PRICES + self.shifts.get(other, 0.0), PRICES, self.predicted[other]) for other in self.remaining
        ]
        # From dear to cheap, along which bits grow, as np.interp wants it.
        price = float(4.0 ** np.interp(self.left, np.sum(curves, 0)[::-1], PRICES[::-1]))
        self.first = self.first or price
        # What small layers at the end could make up for would ruin them.
        self.price = min(max(price, self.first / DRIFT), self.first * DRIFT)
        return self.price

    def spent(self, name: str, bits: float) -> None:
        """The layer `name` took so many."""
        del self.remaining[name]
        self.left -= bits
        curve = self.predicted[name]
        if curve[-1] < bits < curve[0]:
            shift = float(np.interp(bits, curve[::-1], PRICES[::-1])) - math.log(self.price, 4)
            # Where bits fall twice as fast as predicted, the whole shift would lead to and fro.
            self.shifts[name] = (shift + self.shifts[name]) / 2 if name in self.alike else shift
        elif bits <= curve[-1]:
            self.shifts[name] = self.shifts.get(name, 0.0) + EMPTY
        self.alike.add(name)


def _curve(weight: Tensor, sensitivity: LayerSensitivity) -> np.ndarray:
    """The bits of all rounded weights of a layer at each of PRICES."""
    rows = weight.detach().flatten(1).float()
    values = (rows if sensitivity.live is None else rows[:, sensitivity.live]).flatten()
    deviation = float(values.square().mean().sqrt())
    if deviation == 0 or sensitivity.input_energy == 0:
        return np.zeros(len(PRICES))
    sample = values[:: -(-len(values) // SAMPLE)].contiguous()
    noise = torch.randn(len(sample), generator=torch.Generator().manual_seed(0)).to(sample) * (sample != 0)
    bits = []
    for octave in OCTAVES:
        carried = min(CARRIED, MOST_CARRIED * 2.0**-octave) * noise  # a pruned weight stays zero
        bits.append(entropy([(sample / (deviation * 2.0**octave) + carried).round()]) / len(sample))
    step = step_of(1.0 / sensitivity.curvature, sensitivity.input_energy)  # at a price of 1, and 4^x times that: 2^x
    octaves = PRICES + math.log2(step / deviation)
    finer = np.clip(OCTAVES[0] - octaves, 0, None)
    curve: np.ndarray = len(values) * (np.interp(octaves, OCTAVES, bits) + finer)
    return curve


class RateQuantization:
    """Quantizes one network at any number of rates; what does not depend on the rate is measured once."""

    def __init__(self, options: Options, model: nn.Module, calibration_batches: CalibrationBatches) -> None:
        self.options = options
        with full_float32():
            self.prepared = prepare(model, calibration_batches, options.skip)
            self.images = sum(map(len, self.prepared.images))
            if self.images < 2:
                raise UserError("calibration images: found 1; accepted for rates: at least 2, as one does not vary")
            self.sensitivities = measure(self.prepared)
        weights = {name: layer_of(self.prepared.analog, name).weight for name in self.prepared.order}
        self.count = sum(weight.numel() for weight in weights.values())
        self.control = RateControl(weights, self.sensitivities)

    def __call__(self, rate: float, progress: Progress = silent) -> QuantizedModel:
        """The network at `rate` bits a weight, give or take the share NEAR of them.

        With few images for many inputs the bits can leap as the price changes; then it is the nearest of WALKS.
        """
        best = self.walk(rate, progress)
        for _ in range(WALKS - 1):
            if abs(best.rate - rate) <= NEAR * rate:
                break
            best = min(best, self.walk(rate, progress), key=lambda found: abs(found.rate - rate))
        return best

    @full_float32()
    def walk(self, rate: float, progress: Progress = silent) -> QuantizedModel:
        """The network at about `rate` bits a weight. A second walk for about as many bits comes nearer."""
        self.control.start(rate * self.count)
        return quantize_prepared(self.prepared, self.options, self._answer, progress)

    def _answer(self, name: str, layer: Layer, quantized: list[Tensor], analog: list[Tensor]) -> Answer:
        sensitivity = self.sensitivities[name]
        moments = layer_moments(layer, quantized, analog, self.options, name)
        assert moments is not None  # the solvers that have a price read the inputs
        price = self.control.price_of(name) / sensitivity.curvature
        codes, grid, bias, bits = solve_layer_for_price(layer, moments, price, self.options, name)
        self.control.spent(name, bits)
        return Answer(codes, grid, bias, bits / codes.numel(), sensitivity.divergence / self.images)
