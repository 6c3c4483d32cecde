"""Networks of a rate: the coded bits of a quantized weight in the mean, first and last layer included.

Minimised is `divergence of the logits + price * bits`, with one price for the network. What a unit of output error of a
layer adds to the divergence is measured once (see `compress.quantization.logit_sensitivity`), which turns the price of
the network into that of each layer. The price for a rate is found on the way: each layer is solved at the price that is
predicted to spend the bits that are left on the layers that are left; from half of its passes on that is predicted
again.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

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
from compress.quantization.patches import spread
from compress.quantization.post_training import Answer, quantize_prepared
from compress.quantization.preparation import prepare
from compress.quantization.quantized import QuantizedModel
from compress.quantization.rate_distortion import entropy_alone, step_of

# Weights of a layer that its curve is made of, and the steps of the curve, in octaves of the weights' deviation.
SAMPLE, OCTAVES = 1 << 13, np.arange(-5.0, 6.0, 0.5)
# How unevenly errors are carried from weight to weight: the deviation of the logarithm of their size.
UNEVEN = 1.2
# Prices that are told apart, by the octaves of the step that they give.
PRICES = np.arange(-40.0, 40.0, 0.02)
# The price of a layer is at most so many times that of the first one, or that less. In walks of a ResNet-20 and a
# ResNet-8x4 at 2 to 0.5 bits a weight, unequal prices cost from 0.1 to 0.9 % of the bits.
DRIFT = 2.0
# The share of the bits of the network that a price is not changed for.
SPARED = 0.0025
# How near a rate is near enough, and how many walks it is worth.
NEAR, WALKS = 0.02, 4
# How many octaves a prediction is moved by where a layer took no bits at all.
EMPTY = 1.0
# Octaves between two prices that say how fast bits fall, and how many times as fast as predicted, or as slow, at most.
TOLD_APART, STEEPEST = 0.02, 2.0


class Met(NamedTuple):
    """A layer took at a `price` the bits of its curve `at` another; both as logarithms, as PRICES are.

    slope: how many times as far the one moves as the other.
    """

    price: float
    at: float
    slope: float = 1.0

    def expected(self, price: Any) -> Any:
        """Where on its curve the layer will be at another `price`, a number or an array of them."""
        return self.at + self.slope * (price - self.price)

    def then(self, price: float, at: float) -> "Met":
        """What is known when a further price has been met."""
        moved = price - self.price
        if self is NEVER or abs(moved) < TOLD_APART:
            return Met(price, at, self.slope)
        return Met(price, at, min(max((at - self.at) / moved, 1 / STEEPEST), STEEPEST))


NEVER = Met(0.0, 0.0)


class RateControl:
    """The price for each layer, in units of divergence per bit, so that all of them take a number of bits together.

    Bits of a layer at a price are predicted by those of its weights, each decided by itself; by what it takes after
    half of its passes, once it does; and in a later walk by what the layer took in the one before.
    """

    def __init__(self, weights: Mapping[str, Tensor], sensitivities: Mapping[str, LayerSensitivity]) -> None:
        self.predicted = {name: _curve(weight, sensitivities[name]) for name, weight in weights.items()}
        self.met: dict[str, Met] = {}
        # How many times the bits that are foreseen at the last revision a layer takes in the end.
        self.growth = dict.fromkeys(weights, 1.0)

    def start(self, bits: float) -> None:
        """From here on the layers are solved again, to take `bits` in all."""
        self.left, self.remaining = bits, dict.fromkeys(self.predicted)
        self.spared = SPARED * bits
        self.price = self.first = 0.0

    def price_of(self, name: str) -> float:
        """The price at which the layer `name`, the next, and all after it are predicted to take the bits left."""
        self.before, self.foreseen = self.met.get(name, NEVER), 0.0
        return self._best_price()

    def revised_price(self, name: str, bits: float) -> float:
        """That price for the rest of its passes, where the layer takes so many after half of them or more."""
        self._meet(name, bits * self.growth[name])
        price = self._best_price()
        if bits:
            at = self.met.get(name, NEVER).expected(math.log(price, 4))
            self.foreseen = float(np.interp(at, PRICES, self.predicted[name]))
        return price

    def spent(self, name: str, bits: float) -> None:
        """The layer `name` took so many."""
        if self.foreseen and bits:
            # Damped, as bits can leap when the price changes.
            self.growth[name] *= math.sqrt(bits / self.foreseen)
        self._meet(name, bits)
        del self.remaining[name]
        self.left -= bits

    def _best_price(self) -> float:
        """That price, kept as `price`, and as `first` where it is the first of the walk."""
        curves = [
            np.interp(self.met.get(name, NEVER).expected(PRICES), PRICES, self.predicted[name])
            for name in self.remaining
        ]
        # From dear to cheap, along which bits grow, as np.interp wants it.
        aims = self.left + np.array([self.spared, 0.0, -self.spared])
        least, price, most = (4.0 ** np.interp(aims, np.sum(curves, 0)[::-1], PRICES[::-1])).tolist()
        if not self.first:
            self.price = self.first = price
        self.price = min(max(self.price, least), most)
        # What small layers at the end could make up for would ruin them.
        self.price = min(max(self.price, self.first / DRIFT), self.first * DRIFT)
        return self.price

    def _meet(self, name: str, bits: float) -> None:
        curve, before, price = self.predicted[name], self.before, math.log(self.price, 4)
        if curve[-1] < bits < curve[0]:
            self.met[name] = before.then(price, float(np.interp(bits, curve[::-1], PRICES[::-1])))
        elif bits <= curve[-1]:
            self.met[name] = Met(price, before.expected(price) + EMPTY, before.slope)


def _curve(weight: Tensor, sensitivity: LayerSensitivity) -> np.ndarray:
    """The bits of all weights of a layer at each of PRICES, each weight decided by itself."""
    values, live = weight.detach().flatten(1).float(), sensitivity.live
    if live is not None:
        # What no input reaches becomes zero.
        values = torch.zeros_like(values).index_copy(1, live, values[:, live])
    counted = values.numel() if live is None else len(values) * len(live)
    deviation = float((values.square().sum() / max(counted, 1)).sqrt())
    if deviation == 0 or sensitivity.input_energy == 0:
        return np.zeros(len(PRICES))
    sample = values.flatten()[:: spread(-(-values.numel() // SAMPLE), values.shape[1])].contiguous()
    # A pruned weight stays zero.
    normal, size = torch.randn(2, len(sample), generator=torch.Generator().manual_seed(0)).to(sample)
    noise = normal * (UNEVEN * size - UNEVEN**2).exp() * (sample != 0)
    bits = []
    for octave in OCTAVES:
        in_steps = 2.0**-octave
        bits.append(entropy_alone(sample / deviation * in_steps + _carried(in_steps) * noise) / len(sample))
    step = step_of(1.0 / sensitivity.curvature, sensitivity.input_energy)  # at a price of 1, and 4^x times that: 2^x
    octaves = PRICES + math.log2(step / deviation)
    finer = np.clip(OCTAVES[0] - octaves, 0, None)
    curve: np.ndarray = values.numel() * np.interp(octaves, OCTAVES, bits) + counted * finer
    return curve


def _carried(deviation: float) -> float:
    """The deviation of what the errors before a weight add to it, for weights of that `deviation`, both in steps.

    At a guess, as UNEVEN, by which the bits of the layers of a ResNet-20 and of a ResNet-8 four times as wide are
    predicted best together, at 2 to 0.35 bits a weight.
    """
    return min(0.5 / (1 + 2.5 * deviation), 2 * deviation)


class RateQuantization:
    """Quantizes one network at any number of rates; what does not depend on the rate is measured once."""

    def __init__(self, options: Options, model: nn.Module, calibration_batches: CalibrationBatches) -> None:
        self.options = options
        with full_float32():
            self.prepared = prepare(model, calibration_batches, options.skip)
            self.images = sum(map(len, self.prepared.images))
            if self.images < 2:
                raise UserError("calibration images: found 1; accepted for rates: at least 2, as one does not vary")
            self.sensitivities = measure(self.prepared, options.refinement.coupled_rows)
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

        def revise(bits: float) -> float:
            return self.control.revised_price(name, bits) / sensitivity.curvature

        price = self.control.price_of(name) / sensitivity.curvature
        codes, grid, bias, bits = solve_layer_for_price(
            layer, moments, price, self.options, name, revise, sensitivity.coupling
        )
        self.control.spent(name, bits)
        return Answer(codes, grid, bias, bits / codes.numel(), sensitivity.divergence / self.images)
