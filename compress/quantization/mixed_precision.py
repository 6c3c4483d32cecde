"""A width for each layer: the most accurate network within a budget of bytes, or the smallest within a drop."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from compress.errors import UserError
from compress.quantization.quantized import QuantizedLayer, QuantizedModel
from compress.quantization.sensitivity import Sensitivities

# Neighbouring budgets of the ladder of `smallest_within_drop`: the lower one in units of the higher.
RUNG = 0.95
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20}


@dataclass(frozen=True)
class Measures:
    """What a search for widths asks of whoever writes and evaluates networks.

    file_bytes: of a written network; layer_bytes: what of it is one layer's codes; accuracy: on validation images,
    0..1; float_bytes: of the float32 network's file.
    """

    file_bytes: Callable[[QuantizedModel], int]
    layer_bytes: Callable[[QuantizedLayer], int]
    accuracy: Callable[[nn.Module], float]
    float_bytes: int


class WidthSearch:
    """Chooses widths by `sensitivities`; `quantize` makes a network of them, layer after layer."""

    def __init__(
        self, sensitivities: Sensitivities, measures: Measures, quantize: Callable[[Mapping[str, int]], QuantizedModel]
    ) -> None:
        self.sensitivities, self.measures, self.quantize = sensitivities, measures, quantize
        smallest = sensitivities.model(sensitivities.smallest())
        codes = sum(map(measures.layer_bytes, smallest.layers.values()))
        self.rest = measures.file_bytes(smallest) - codes

    def within_budget(self, budget: int) -> QuantizedModel:
        """The network of least summed divergence whose file has at most `budget` bytes; UserError: there is none."""
        quantized = self._within(budget)
        if quantized is not None:
            return quantized
        quantized = self.quantize(self.sensitivities.smallest())
        check_budget(budget, self.measures.file_bytes(quantized))
        return quantized

    def smallest_within_drop(self, model: nn.Module, max_drop: float) -> QuantizedModel:
        """The smallest file whose validation accuracy is at most `max_drop` points below that of the float `model`.

        Accuracy need not grow with the budget. A ladder of budgets, a twentieth apart, is climbed from the smallest
        file on, and the first network that keeps the drop ends it: of all that were measured none smaller does. What
        the widths for a twentieth fewer bytes give is measured then, and taken for as long as it keeps the drop too. So
        every rung below the answer is known to lose more, and the next one, a twentieth below it, as well.

        Cost: a quantization and an evaluation of the largest and the smallest file, of each rung up to the answer and
        of each network after it. The ladder has log(largest / smallest) / log(1 / 0.95) rungs, 27 where the largest
        file has four times as many bytes as the smallest; rungs of the same widths count once.
        """
        target = self.measures.accuracy(model) - max_drop / 100
        largest = self.quantize(self.sensitivities.largest())
        accuracy = self.measures.accuracy(largest.model)
        if accuracy < target:
            lost = 100 * (target - accuracy) + max_drop
            raise UserError(
                f"quantizer.max_drop: found {max_drop}, but the largest widths of quantizer.bits lose {lost:.2f} "
                "points on the validation set; accepted: more, or wider quantizer.bits"
            )
        answer = self._climb(target, largest)
        while (smaller := self._within(int(RUNG * self.measures.file_bytes(answer)))) is not None:
            if self.measures.accuracy(smaller.model) < target:
                break
            answer = smaller
        return answer

    def _climb(self, target: float, largest: QuantizedModel) -> QuantizedModel:
        """The first network, from the smallest file on, whose accuracy is at least `target`; at last `largest`."""
        smallest = self.quantize(self.sensitivities.smallest())
        budget, last = self.measures.file_bytes(smallest), self.measures.file_bytes(largest)
        candidate: QuantizedModel | None = smallest
        measured: dict[str, int] | None = None
        while budget < last:
            if candidate is not None and (widths := candidate.widths()) != measured:
                if self.measures.accuracy(candidate.model) >= target:
                    return candidate
                measured = widths
            budget = int(budget / RUNG)
            if self.sensitivities.within(budget - self.rest, self.measures.layer_bytes) != measured:
                candidate = self._within(budget)
        return largest

    def _within(self, budget: int) -> QuantizedModel | None:
        """As `within_budget`; None: the widths of least divergence for ever fewer bytes have all made larger files."""
        room = budget - self.rest
        while (bits := self.sensitivities.within(room, self.measures.layer_bytes)) is not None:
            quantized = self.quantize(bits)
            excess = self.measures.file_bytes(quantized) - budget
            if excess <= 0:
                return quantized
            # The header has grown by some digits, or fewer weights were rounded to zero than in each layer alone.
            room -= excess
        return None


def check_budget(budget: int, smallest: int) -> None:
    """Raises UserError for a budget of bytes below the `smallest` file."""
    if budget < smallest:
        raise UserError(
            f"quantizer.budget: found {budget:,} bytes, but the smallest file with these quantizer.bits has "
            f"{smallest:,}; accepted: at least that, or lower bits"
        )


def budget_bytes(budget: str | float, float_bytes: int) -> int:
    """The bytes of 500000, "500kB", "0.5MB", "1MiB", or of "8x": an eighth of the float32 file's `float_bytes`.

    Raises UserError for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", str(budget))
    number, unit = (float(match[1]), match[2] or "B") if match else (0.0, "")
    if unit == "x" and number >= 1:
        return int(float_bytes / number)
    if unit in UNITS and number * UNITS[unit] >= 1:
        return int(number * UNITS[unit])
    raise UserError(f"budget: found {budget!r}; accepted: a size such as 500kB, 0.5MB or 1MiB, or a ratio such as 8x")
