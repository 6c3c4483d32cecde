"""Which layers have to compute on integers for a network to keep a latency, and which may stay float.

What a layer saves is measured within the network: how much longer all of it takes while that layer alone is float.
Layers go on integers in the order of what they save for what they change in the predictions, as many as it takes, which
is measured end to end. Layers that save nothing stay float.
"""

import copy
import glob
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from compress.errors import UserError
from compress.models.canonical import layer_of
from compress.models.inference import full_float32
from compress.quantization.activations import detach_input_quantizer
from compress.quantization.options import Correction, Options, Progress, silent
from compress.quantization.post_training import quantize_with
from compress.quantization.preparation import prepare
from compress.quantization.quantized import QuantizedModel, float_state
from compress.quantization.refinement import Refinement
from compress.quantization.solvers import RTN

UNITS = {"s": 1000.0, "ms": 1.0, "us": 0.001}
# Networks that are timed in turn, beside the one that they are compared with: all are in memory at the same time.
TOGETHER = 8
# Images that the predictions are compared on.
COMPARED = 64
# Of the latency that is asked for, what is aimed at: on a machine that others use, two measurements differ by so much.
AIM = 0.9
# And what is enough of a network that will be written.
SURE = 0.97
# Nats, below which rounding decides how far two predictions are from each other.
LEAST = 1e-9


@dataclass(frozen=True)
class Runtime:
    """Where networks are timed: its name, and the median milliseconds of an image in networks that take turns."""

    name: str
    latencies_ms: Callable[[Sequence[nn.Module | QuantizedModel]], list[float]]


def limit_ms(latency: str | float, float_ms: float) -> float:
    """The milliseconds of "1.5ms", "800us" or "0.01s", or of "2x": half of `float_ms`.

    Raises UserError for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+)\s*", str(latency))
    number, unit = (float(match[1]), match[2]) if match else (0.0, "")
    if unit == "x" and number > 1:
        return float_ms / number
    if unit in UNITS and number > 0:
        return number * UNITS[unit]
    raise UserError(
        f"latency: found {latency!r}; accepted: a time above 0, such as 1.5ms or 800us, or a speedup such as 2x"
    )


class LatencySearch:
    """The layers of `model` that stay float under a `latency`, see `limit_ms`, at `bits` bits in the others.

    calibration_batches: images as the model takes them. Latencies do not depend on the values of weights, so that
    fresh ones will do to see what is possible.
    """

    def __init__(
        self,
        options: Options,
        model: nn.Module,
        calibration_batches: Sequence[Tensor],
        bits: int,
        latency: str | float,
        runtime: Runtime,
        progress: Progress = silent,
    ) -> None:
        self.model, self.latency, self.runtime, self.progress = model, latency, runtime, progress
        images = torch.cat([*calibration_batches])[:COMPARED]
        rough = replace(options, solver=RTN(), refinement=Refinement(), correction=Correction(bias=False))
        self.prepared = prepare(model, [images], options.skip)
        self.whole = quantize_with(rough, model, [images], bits)
        self.names = [*self.whole.layers]

    def check(self) -> None:
        """Raises UserError for a latency that float32 keeps, and for one that nothing keeps."""
        float_ms, integer_ms = self.runtime.latencies_ms([self.model, self.whole])
        limit = limit_ms(self.latency, float_ms)
        if float_ms <= limit:
            raise UserError(
                f"quantizer.latency: found {self.latency}, which the float32 network keeps with {float_ms:.3g} ms in "
                f"{self.runtime.name}; accepted: less"
            )
        if integer_ms <= limit:
            return
        fastest_ms, limit = self._fastest()
        if fastest_ms > limit:
            raise UserError(
                f"quantizer.latency: found {self.latency}, at most {limit:.3g} ms, but {fastest_ms:.3g} ms is the "
                f"least that this network takes in {self.runtime.name} here; accepted: a longer time or a smaller "
                "speedup"
            )

    def floats(self) -> Iterator[list[str]]:
        """The names of layers that stay float, as many as seem possible; each time that more is asked for, fewer.

        Of a latency that nothing keeps, after all, it is the fastest network.
        """
        fastest, limit = self._fastest()
        if fastest > SURE * limit:
            yield [name for name in self.names if name not in self.order]
            return
        every = len(self.order)
        low, high = 0, every
        while high - low > 1:
            middle = (low + high) // 2
            found, limit = self._timed(self._with(self.order[:middle]))
            low, high = (low, middle) if found <= AIM * limit else (middle, high)
        for count in [*range(high, every, max(1, every // 8)), every]:
            yield [name for name in self.names if name not in self.order[:count]]

    def keeps(self, quantized: QuantizedModel) -> bool:
        """Whether a network, as it will be written, keeps the latency, and will when it is measured again."""
        found, limit = self._timed(quantized)
        return found <= SURE * limit

    @cached_property
    def saved_ms(self) -> dict[str, float]:
        """How many milliseconds longer the network takes while one layer, its name, is float."""
        saved: dict[str, float] = {}
        for start in range(0, len(self.names), TOGETHER):
            some = self.names[start : start + TOGETHER]
            without = [self._with([other for other in self.names if other != name]) for name in some]
            of_whole, *of_others = self.runtime.latencies_ms([self.whole, *without])
            saved |= {name: other - of_whole for name, other in zip(some, of_others, strict=True)}
            self.progress(len(saved), len(self.names), f"{self.runtime.name}  {some[-1]}")
        return saved

    @cached_property
    def order(self) -> list[str]:
        """The layers that save time, first what saves most for what it changes."""
        worth = {name: saved / self._divergence(name) for name, saved in self.saved_ms.items() if saved > 0}
        return sorted(worth, key=worth.__getitem__, reverse=True)

    def _fastest(self) -> tuple[float, float]:
        """The milliseconds of the network with all of `order` on integers, and those that it may take.

        Where these are too many and those of every layer on integers are fewer, `order` has them all from then on.
        """
        found, limit = self._timed(self._with(self.order)) if self.order else (math.inf, 0.0)
        others = [name for name in self.names if name not in self.order]
        if found > limit and others:
            whole, whole_limit = self._timed(self.whole)
            if whole < found:
                self.order += others
                return whole, whole_limit
        return found, limit

    def _timed(self, quantized: QuantizedModel) -> tuple[float, float]:
        """Its milliseconds, and those that it may take."""
        float_ms, found = self.runtime.latencies_ms([self.model, quantized])
        return found, limit_ms(self.latency, float_ms)

    @full_float32()
    @torch.no_grad()
    def _divergence(self, name: str) -> float:
        """Of the predictions, in nats an image, while the layer `name` alone is on integers."""
        [images] = self.prepared.images
        expected, found = (
            network(images).double().log_softmax(1) for network in (self.prepared.analog, self._with([name]).model)
        )
        return max(kl_div(found, expected, reduction="batchmean", log_target=True).item(), LEAST)

    def _with(self, integers: Collection[str]) -> QuantizedModel:
        """The network with those layers on integers that are named."""
        network = copy.deepcopy(self.whole.model)
        for name, holder in [*((name, name) for name in self.names), *self.whole.tied.items()]:
            if holder not in integers:
                layer, analog = layer_of(network, name), layer_of(self.prepared.analog, name)
                layer.weight, layer.bias = analog.weight, analog.bias
                detach_input_quantizer(layer)
        layers = {name: layer for name, layer in self.whole.layers.items() if name in integers}
        tied = {name: holder for name, holder in self.whole.tied.items() if holder in integers}
        skipped = self.whole.skipped | {name: "is float" for name in self.names if name not in integers}
        return replace(
            self.whole,
            model=network,
            layers=layers,
            float_state=float_state(network, [*layers, *tied]),
            skipped=skipped,
            tied=tied,
        )


def as_patterns(names: Collection[str]) -> list[str]:
    """What `Options.skip` takes for layers of these names."""
    return [glob.escape(name) for name in names]
