"""The network of a budget of bytes, or the smallest within a drop of accuracy, among those of all rates."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from compress.errors import UserError
from compress.quantization.latency import Runtime
from compress.quantization.options import Progress
from compress.quantization.quantized import QuantizedModel
from compress.quantization.rates import RateQuantization

# Bits a weight that there are networks of.
LOWEST, HIGHEST = 0.1, 8.0
# A file of this share of a budget is near enough; the middle of what is left is aimed at, so many times at most.
ENOUGH, AIM, WALKS = 0.99, 0.996, 8
# From one rate to the next lower one that is tried for a drop, and from where on two rates are not told apart.
RUNG, NEAR = 0.75, 1.03
# Points of accuracy that rounding alone may cost.
ROUNDING = 1e-9
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20}


@dataclass(frozen=True)
class Measures:
    """What a search for a rate or for a latency asks of whoever writes and evaluates networks.

    file_bytes: of a written network; float_bytes: of the float32 network's file; accuracy: on validation images, 0..1,
    None where nothing has to keep one; runtime: where networks are timed, None where no latency is asked for.
    """

    file_bytes: Callable[[QuantizedModel], int]
    float_bytes: int
    accuracy: Callable[[nn.Module], float] | None = None
    runtime: Runtime | None = None


def within_budget(quantize: RateQuantization, budget: int, measures: Measures, progress: Progress) -> QuantizedModel:
    """The network whose file has from ENOUGH of `budget` bytes to all of them, or the largest within it of WALKS.

    Raises UserError, which says the smallest file, where the one of LOWEST bits a weight has more. A network of HIGHEST
    bits a weight is the answer to every larger budget.
    """
    best: QuantizedModel | None = None
    most, rate = 0, _share(8 * budget, quantize.count)
    for _ in range(WALKS):
        found = quantize.walk(rate, progress)
        size = measures.file_bytes(found)
        if most < size <= budget:
            best, most = found, size
        if ENOUGH * budget <= size <= budget or (size <= budget and rate == HIGHEST):
            break
        if size > budget and rate == LOWEST:
            check_budget(budget, size)
        rate = _share(found.rate * quantize.count + 8 * (AIM * budget - size), quantize.count)
    if best is None:
        raise UserError(
            f"quantizer.budget: found {budget:,} bytes, which no file kept in {WALKS} attempts; accepted: another, or "
            "more quantizer.calibration_images"
        )
    return best


def smallest_within_drop(
    quantize: Callable[[float], QuantizedModel], model: nn.Module, max_drop: float, measures: Measures
) -> QuantizedModel:
    """The network of the lowest rate whose validation accuracy is at most `max_drop` points below that of `model`.

    Rates from HIGHEST on, each RUNG times the one before, are tried until one loses more; then the rates between that
    and the one before are halved until they are NEAR. Accuracy need not fall with the rate: what is known of the answer
    is that it keeps the drop, and that one of a NEAR lower rate does not. Raises UserError where HIGHEST loses more.
    """
    assert measures.accuracy is not None  # whoever allows a drop measures it
    target = measures.accuracy(model) - (max_drop + ROUNDING) / 100
    rate = HIGHEST
    answer = quantize(rate)
    if (accuracy := measures.accuracy(answer.model)) < target:
        lost = 100 * (target - accuracy) + max_drop
        raise UserError(
            f"quantizer.max_drop: found {max_drop}, but {HIGHEST:g} bits a weight lose {lost:.2f} points on the "
            "validation set; accepted: more"
        )
    failed = 0.0
    while rate > LOWEST and (failed == 0 or rate > NEAR * failed):
        tried = (rate * failed) ** 0.5 if failed else max(RUNG * rate, LOWEST)
        candidate = quantize(tried)
        if measures.accuracy(candidate.model) < target:
            failed = tried
        else:
            answer, rate = candidate, tried
    return answer


def check_budget(budget: int, smallest: int) -> None:
    """Raises UserError for a budget of bytes below the `smallest` file."""
    if budget < smallest:
        raise UserError(
            f"quantizer.budget: found {budget:,} bytes, but the smallest file of this network has {smallest:,}; "
            "accepted: at least that"
        )


def _share(bits: float, count: int) -> float:
    return min(max(bits / count, LOWEST), HIGHEST)


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
