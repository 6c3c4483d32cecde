"""The quantizer that a YAML file describes: `quantize` with its options bound, and what it makes of a network."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor, nn

from compress.errors import UserError
from compress.quantization.mixed_precision import Choices, Progress, sensitivities
from compress.quantization.post_training import Options, QuantizedLayer, QuantizedModel, quantize
from compress.quantization.refinement import Refinement

Bits = Annotated[int, Field(ge=2, le=16)]
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20}
# Halvings of the range of sizes in the search for the smallest file within a drop.
HALVINGS = 6


def _as_list(value):
    return [value] if isinstance(value, int) else value


def _each_once(widths):
    if len(set(widths)) < len(widths):
        raise ValueError("every width once")
    return widths


@dataclass(frozen=True)
class Budget:
    """Bytes that a file may have: a number of them, or the float32 file's divided by `ratio`."""

    size: int | None = None
    ratio: float | None = None

    @classmethod
    def parse(cls, text: str | float) -> "Budget":
        """Reads 500000, "500kB", "0.5MB", "1MiB" or "8x". Raises UserError for anything else."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", str(text))
        number, unit = (float(match[1]), match[2] or "B") if match else (0.0, "")
        if unit == "x" and number >= 1:
            return cls(ratio=number)
        if unit in UNITS and number * UNITS[unit] >= 1:
            return cls(size=int(number * UNITS[unit]))
        raise UserError(
            f"quantizer.budget: found {text!r}; accepted: a size such as 500kB, 0.5MB or 1MiB, or a ratio such as 8x"
        )

    def bytes(self, float_bytes: int) -> int:
        """The number of bytes, where the float32 file has `float_bytes`."""
        return self.size if self.ratio is None else int(float_bytes / self.ratio)


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


@dataclass(frozen=True)
class Variant:
    """One quantized network; `bits` is its mean width without the first and the last layer's, weights counted."""

    label: str
    model: QuantizedModel
    bits: float
    levels: int | None


class Quantizer:
    """Options of `compress.quantization.quantize`, bound.

    bits: bit widths to quantize to, one model each; with a `budget` ("0.5MB", or "8x" smaller than float32) or a
    `max_drop` (points of validation accuracy) the widths that a layer may have, in one model of mixed precision: the
    most accurate within the budget, or the smallest within the drop. sensitivity_images: those of the calibration
    images that a layer's width is judged by.
    alphabet: "exact" is 2^bits levels, "published" 2^bits + 1, "narrow" 2^bits - 1, as many on either side of zero.
    activation_bits: of the layers' inputs too; None: float. calibration_images: how many training images the caller
    should pass. scale_candidates, sweeps and refit are those of `Refinement`, the other arguments those of `quantize`,
    which checks them too. `name` is the solver's. In YAML `solver` is a mapping (`_target_`, `_partial_: true`) from
    which Hydra makes the callable.
    """

    def __init__(
        self,
        solver: Callable[..., Tensor] | dict[str, Any],
        bits: Annotated[list[Bits], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_each_once)],
        budget: str | float | None = None,
        max_drop: Annotated[float, Field(ge=0, le=100)] | None = None,
        sensitivity_images: Annotated[int, Field(ge=1)] = 128,
        alphabet: Literal["exact", "published", "narrow"] = "exact",
        first_last_bits: Bits | None = 8,
        skip: Sequence[str] = (),
        calibration_images: Annotated[int, Field(ge=1)] = 256,
        max_rows: Annotated[int, Field(ge=1)] | None = None,
        activation_bits: Annotated[int, Field(ge=2, le=8)] | None = None,
        activation_range: Literal["mse", "min_max", "percentile"] = "mse",
        activation_percentile: Annotated[float, Field(gt=0.5, le=1)] = 0.9999,
        zero_point: Literal["symmetric", "mirrored", "affine"] = "mirrored",
        granularity: Literal["channel", "layer"] = "channel",
        scale: Literal["mse", "max_abs", "percentile"] = "mse",
        percentile: Annotated[float, Field(gt=0, le=1)] = 1.0,
        alphabet_scalar: Annotated[float, Field(gt=0)] = 1.16,
        bias_correction: bool = True,
        batch_norm_reestimation: bool = False,
        scale_candidates: Annotated[int, Field(ge=1, le=64)] = 1,
        sweeps: Annotated[int, Field(ge=0)] = 0,
        refit: bool = False,
        block_size: Annotated[int, Field(ge=1)] = 128,
        gram_dtype: Literal["float32", "float64"] = "float32",
    ) -> None:
        self.name = getattr(solver, "func", solver).__name__
        self.bits = [int(width) for width in _as_list(bits)]
        self.budget = None if budget is None else Budget.parse(budget)
        self.max_drop = max_drop
        if budget is not None and max_drop is not None:
            raise UserError("quantizer.max_drop: found it beside quantizer.budget; accepted: one of the two")
        self.sensitivity_images = sensitivity_images
        self.calibration_images = calibration_images
        self.first_last_bits = first_last_bits
        self.alphabet = alphabet
        self.activation_bits = activation_bits
        self.options = {
            "solver": solver,
            "levels": None if alphabet == "exact" else alphabet,
            "max_rows": max_rows,
            "activation_bits": activation_bits,
            "activation_range": activation_range,
            "activation_percentile": activation_percentile,
            "zero_point": zero_point,
            "granularity": granularity,
            "first_last_bits": first_last_bits,
            "skip": list(skip),
            "scale": scale,
            "percentile": percentile,
            "alphabet_scalar": alphabet_scalar,
            "bias_correction": bias_correction,
            "batch_norm_reestimation": batch_norm_reestimation,
            "refine": Refinement(scale_candidates, sweeps, refit),
            "block_size": block_size,
            "gram_dtype": getattr(torch, gram_dtype),
        }
        # What does not go together is said now, and not when there is something to quantize.
        Options(**{key: value for key, value in self.options.items() if key not in ("activation_bits", "skip")})

    @property
    def mixed(self) -> bool:
        """Whether the layers get widths of their own."""
        return self.budget is not None or self.max_drop is not None

    def levels(self, bits: int) -> int:
        """Levels of the grids of `bits` bits: 2^bits, one more in the published alphabet and one less in the narrow."""
        return 2**bits + {"exact": 0, "published": 1, "narrow": -1}[self.alphabet]

    def __call__(
        self,
        model: nn.Module,
        calibration_batches: Iterable,
        bits: int | Mapping[str, int],
        progress: Callable[[int, int, str, int], None] | None = None,
    ) -> QuantizedModel:
        """`model` quantized to `bits` bits; see `compress.quantization.quantize`."""
        return quantize(model, calibration_batches, bits, progress=progress, **self.options)

    def variants(
        self, model: nn.Module, batches: Sequence[Tensor], measures: Measures, progress: Progress
    ) -> Iterator[Variant]:
        """What becomes of `model` under these options: one variant per width, or one of mixed precision.

        progress: called as progress(done, total, what is being done).
        """
        if not self.mixed:
            for bits in self.bits:
                yield Variant(f"{bits} bit", self._quantized(model, batches, bits, progress), bits, self.levels(bits))
            return
        choices = self.choices(model, batches, progress)
        if self.budget is not None:
            budget = self.budget.bytes(measures.float_bytes)
            quantized = self._within(model, batches, choices, budget, measures, progress)
            if quantized is None:
                quantized = self._quantized(model, batches, choices.smallest(), progress)
                size = measures.file_bytes(quantized)
                if size > budget:
                    raise UserError(too_small(budget, size))
        else:
            quantized = self._least(model, batches, choices, measures, progress)
        yield Variant("mixed", quantized, _mean_width(choices, quantized), None)

    def choices(
        self, model: nn.Module, batches: Iterable, progress: Progress = lambda done, total, what: None
    ) -> Choices:
        """Every layer at every width of `bits`; see `sensitivities`."""
        return sensitivities(
            model, batches, self.bits, images=self.sensitivity_images, progress=progress, **self.options
        )

    def _quantized(
        self, model: nn.Module, batches: Sequence[Tensor], bits: int | Mapping[str, int], progress: Progress
    ) -> QuantizedModel:
        def show(done: int, total: int, layer: str, width: int) -> None:
            progress(done, total, f"{width} bit  {layer}")

        return self(model, batches, bits, show)

    def _within(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        choices: Choices,
        budget: int,
        measures: Measures,
        progress: Progress,
    ) -> QuantizedModel | None:
        """The network of least summed divergence whose file has at most `budget` bytes, if one is found."""
        smallest = choices.model(choices.smallest())
        rest = measures.file_bytes(smallest) - sum(map(measures.layer_bytes, smallest.layers.values()))
        room = budget - rest
        while (bits := choices.within(room, measures.layer_bytes)) is not None:
            quantized = self._quantized(model, batches, bits, progress)
            excess = measures.file_bytes(quantized) - budget
            if excess <= 0:
                return quantized
            # The header has grown by some digits, or fewer weights were rounded to zero than in each layer alone.
            room -= excess
        return None

    def _least(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        choices: Choices,
        measures: Measures,
        progress: Progress,
    ) -> QuantizedModel:
        """The smallest file whose validation accuracy is at most `max_drop` points below the float network's."""
        target = measures.accuracy(model) - self.max_drop / 100
        found = self._quantized(model, batches, choices.largest(), progress)
        accuracy = measures.accuracy(found.model)
        if accuracy < target:
            lost = 100 * (target - accuracy) + self.max_drop
            raise UserError(
                f"quantizer.max_drop: found {self.max_drop}, but the largest widths of quantizer.bits lose {lost:.2f} "
                "points on the validation set; accepted: more, or wider quantizer.bits"
            )
        low = measures.file_bytes(choices.model(choices.smallest()))
        high = measures.file_bytes(found)
        budget = low
        for _ in range(HALVINGS):
            tried = self._within(model, batches, choices, budget, measures, progress)
            if tried is None:
                low = budget
            elif measures.accuracy(tried.model) >= target:
                found, high = tried, measures.file_bytes(tried)
            else:
                low = max(budget, measures.file_bytes(tried))
            if budget >= high or high - low <= high // 200:
                break
            budget = math.isqrt(low * high)
        return found


def _mean_width(choices: Choices, quantized: QuantizedModel) -> float:
    free = [layer for name, layer in quantized.layers.items() if len(choices.answers[name]) > 1]
    counted = free or list(quantized.layers.values())
    return sum(each.bits * each.codes.numel() for each in counted) / sum(each.codes.numel() for each in counted)


def too_small(budget: int, smallest: int) -> str:
    """What to say of a budget of bytes that no widths meet."""
    return (
        f"quantizer.budget: found {budget:,} bytes, but the smallest file with these quantizer.bits has {smallest:,}; "
        "accepted: at least that, or lower bits"
    )
