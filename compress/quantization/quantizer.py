"""The quantizer that a YAML file describes: the options of `quantize`, its widths, and what it makes of a network."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor, nn

from compress.errors import UserError
from compress.quantization.calibration import CalibrationBatches
from compress.quantization.mixed_precision import Measures, WidthSearch, budget_bytes, check_budget
from compress.quantization.options import Bits, Correction, Options, Progress, silent
from compress.quantization.post_training import quantize_with
from compress.quantization.preparation import check_layers
from compress.quantization.quantized import QuantizedModel
from compress.quantization.refinement import Refinement
from compress.quantization.sensitivity import Sensitivities, measure_sensitivities
from compress.quantization.solvers import RTN


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int) else value


def _check_unique(widths: list[int]) -> list[int]:
    if len(set(widths)) < len(widths):
        raise ValueError("every width once")
    return widths


@dataclass(frozen=True)
class Variant:
    """One quantized network; `bits` is its mean width without the first and the last layer's, weights counted."""

    label: str
    model: QuantizedModel
    bits: float
    levels: int | None


@dataclass(frozen=True, kw_only=True)
class Quantizer(Options):
    """`quantize` with its options bound, and the widths to quantize to.

    bits: one model for each; with a `budget` ("0.5MB", or "8x" smaller than float32) or a `max_drop` (points of
    validation accuracy) the widths that a layer may have, in one model of mixed precision: the most accurate within the
    budget, or the smallest within the drop. sensitivity_images: those of the calibration images that a layer's width is
    judged by. calibration_images: how many training images the caller should pass.
    """

    bits: Annotated[list[Bits], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_check_unique)]
    budget: str | float | None = None
    max_drop: Annotated[float, Field(ge=0, le=100)] | None = None
    sensitivity_images: Annotated[int, Field(ge=1)] = 128
    calibration_images: Annotated[int, Field(ge=1)] = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            budget_bytes(self.budget, float_bytes=0)  # only to refuse what is no budget
            if self.max_drop is not None:
                raise UserError("max_drop: found it beside budget; accepted: one of the two")

    @property
    def name(self) -> str:
        """The solver's name."""
        return self.solver.name

    def check(self, student: nn.Module, input_shape: Sequence[int]) -> None:
        """Raises UserError for what does not fit `student` and images (C, H, W), such as a `skip` without a layer."""
        check_layers(student, input_shape, self.skip, "quantizer.skip")

    def check_budget(
        self,
        student: nn.Module,
        batches: CalibrationBatches,
        file_bytes: Callable[[QuantizedModel], int],
        float_bytes: int,
    ) -> None:
        """Raises UserError, naming the smallest possible file, for a budget that no widths of `student` can meet.

        A width takes about as many bytes whatever the weights and images are, so that fresh and few ones will do.
        """
        if self.budget is None:
            return
        rounded = replace(
            self,
            bits=[min(self.bits)],
            solver=RTN(),
            refinement=Refinement(),
            correction=Correction(),
            sensitivity_images=1,
        )
        sensitivities = rounded.sensitivities(student, batches)
        smallest = file_bytes(sensitivities.model(sensitivities.smallest()))
        check_budget(budget_bytes(self.budget, float_bytes), smallest)

    def __call__(
        self,
        model: nn.Module,
        calibration_batches: CalibrationBatches,
        bits: int | Mapping[str, int],
        progress: Progress = silent,
    ) -> QuantizedModel:
        """`model` quantized to `bits` bits; see `compress.quantization.quantize`."""
        return quantize_with(self, model, calibration_batches, bits, progress)

    def variants(
        self, model: nn.Module, batches: Sequence[Tensor], measures: Measures, progress: Progress
    ) -> Iterator[Variant]:
        """What becomes of `model` under these options: one variant for each width, or one of mixed precision."""

        def quantize(bits: int | Mapping[str, int]) -> QuantizedModel:
            return self(model, batches, bits, progress)

        if self.budget is None and self.max_drop is None:
            for bits in self.bits:
                yield Variant(f"{bits} bit", quantize(bits), bits, self.grid.levels(bits))
            return
        sensitivities = self.sensitivities(model, batches, progress)
        search = WidthSearch(sensitivities, measures, quantize)
        if self.budget is not None:
            quantized = search.within_budget(budget_bytes(self.budget, measures.float_bytes))
        else:
            assert self.max_drop is not None
            quantized = search.smallest_within_drop(model, self.max_drop)
        yield Variant("mixed", quantized, _mean_width(sensitivities, quantized), None)

    def sensitivities(
        self, model: nn.Module, batches: CalibrationBatches, progress: Progress = silent
    ) -> Sensitivities:
        """Every layer of `model` at every width of `bits`."""
        return measure_sensitivities(model, batches, self.bits, self, images=self.sensitivity_images, progress=progress)


def _mean_width(sensitivities: Sensitivities, quantized: QuantizedModel) -> float:
    """Bits of a weight in the mean over the layers whose width was chosen, or over all where none was."""
    chosen = [layer for name, layer in quantized.layers.items() if len(sensitivities.answers[name]) > 1]
    counted = chosen or list(quantized.layers.values())
    return sum(layer.bits * layer.codes.numel() for layer in counted) / sum(layer.codes.numel() for layer in counted)
