"""The quantizer that a YAML file describes: the options of `quantize`, its widths, and what it makes of a network."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor, nn

from compress.errors import UserError
from compress.quantization.calibration import CalibrationBatches
from compress.quantization.latency import LatencySearch, Runtime, as_patterns, limit_ms
from compress.quantization.options import Bits, Options, Progress, silent
from compress.quantization.post_training import quantize_with
from compress.quantization.preparation import check_layers, prepare
from compress.quantization.quantized import QuantizedModel
from compress.quantization.rate_search import (
    HIGHEST,
    LOWEST,
    Measures,
    budget_bytes,
    check_budget,
    smallest_within_drop,
    within_budget,
)
from compress.quantization.rates import RateQuantization
from compress.quantization.refinement import Refinement
from compress.quantization.tuning import Tuner, Tuning

WIDTHS, RATES = (8, 4, 3, 2), (2.0, 1.0)  # where neither is given
WIDTH = 8  # where no width is given for a latency
# A rate that was missed by more than this share is called by what it is.
MISSED = 0.05
Rate = Annotated[float, Field(ge=LOWEST, le=HIGHEST)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int | float) else value


def _check_unique(values: list[Any] | None) -> list[Any] | None:
    if values is not None and len(set(values)) < len(values):
        raise ValueError("every value once")
    return values


@dataclass(frozen=True)
class Variant:
    """One quantized network, and what its rows say of it.

    bits: the width of its inner layers or, where there are no `levels`, its coded bits a weight. word: for its file.
    saved_ms: of one for a latency, see `LatencySearch.saved_ms`.
    """

    label: str
    word: str
    model: QuantizedModel
    bits: float
    levels: int | None
    saved_ms: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Quantizer(Options):
    """`quantize` with its options bound, and what to quantize to: one model for each of `bits` and `rates`.

    bits: widths, the same in all layers but perhaps the first and the last; None: `WIDTHS`. rates: coded bits of a
    weight in the mean of all layers, see `compress.quantization.rates`; None: `RATES` beside the widths that None
    stands for, where the solver has any, else none. With a `budget` ("0.5MB", or "8x" smaller than float32) or a
    `max_drop` (points of validation accuracy) there is one model instead: at the rate of the file of that size, or of
    the smallest file within the drop. With a `latency` ("1.5ms", or "2x" as fast as float32) there is one model, too:
    at the one width of `bits` (None: `WIDTH`), with as many layers in float as keep it. calibration_images: how many
    training images the caller should pass. tune: what becomes of each model afterwards, see
    `compress.quantization.tuning`; None: nothing.
    """

    bits: Annotated[list[Bits] | None, BeforeValidator(_as_list), AfterValidator(_check_unique)] = None
    rates: Annotated[list[Rate] | None, BeforeValidator(_as_list), AfterValidator(_check_unique)] = None
    budget: str | float | None = None
    max_drop: Annotated[float, Field(ge=0, le=100)] | None = None
    latency: str | float | None = None
    calibration_images: Annotated[int, Field(ge=1)] = 256
    tune: Tuning | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            budget_bytes(self.budget, float_bytes=0)  # only to refuse what is no budget
            if self.max_drop is not None:
                raise UserError("max_drop: found it beside budget; accepted: one of the two")
        if self.latency is not None:
            self._check_latency(self.latency)
        keys = [key for key in ("rates", "budget", "max_drop") if getattr(self, key) not in (None, [])]
        if keys and not self.solver.has_price:
            raise UserError(
                f"{keys[0]}: found {getattr(self, keys[0])} for {self.solver.name}, which has no rates; "
                "accepted: gpfq without thresholds"
            )
        if not keys and not self.widths:
            raise UserError("bits: found [] and no rates; accepted: one of either at least")
        at_rates = bool(self.coded_rates or self.searches)
        if self.refinement.coupled_rows and not at_rates:
            raise UserError("refinement.coupled_rows: found true without a rate; accepted: false, or rates beside it")
        if self.calibration_images < 2 and at_rates:
            raise UserError("calibration_images: found 1; accepted for rates: at least 2, as one does not vary")

    @property
    def name(self) -> str:
        """The solver's name."""
        return self.solver.name

    @property
    def widths(self) -> Sequence[int]:
        """The widths that `bits` stands for; none where one rate is searched for."""
        if self.searches:
            return ()
        return self.bits if self.bits is not None else WIDTHS if self.latency is None else (WIDTH,)

    @property
    def coded_rates(self) -> Sequence[float]:
        """The rates that `rates` stands for; none where one is searched for."""
        if self.searches:
            return ()
        if self.rates is not None:
            return self.rates
        return RATES if self.bits is None and self.latency is None and self.solver.has_price else ()

    @property
    def searches(self) -> bool:
        """Whether one rate is searched for."""
        return self.budget is not None or self.max_drop is not None

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
        """Raises UserError, naming the smallest possible file, for a budget that no rate of `student` can meet.

        A rate takes about as many bytes whatever the weights and images are, so that fresh and few ones will do.
        """
        if self.budget is not None:
            smallest = self.roughly().at_rates(student, batches)(LOWEST)
            check_budget(budget_bytes(self.budget, float_bytes), file_bytes(smallest))

    def check_latency(self, student: nn.Module, batches: Sequence[Tensor], runtime: Runtime) -> None:
        """Raises UserError for a latency that no choice of layers of `student` can keep in the `runtime`.

        It depends on the shapes of the weights and not on their values, so that fresh ones will do.
        """
        if self.latency is not None:
            [bits] = self.widths
            LatencySearch(self, student, batches, bits, self.latency, runtime).check()

    def roughly(self) -> "Quantizer":
        """As good for the size of a file, and quicker."""
        return replace(self, refinement=Refinement(), tune=None)

    def __call__(
        self,
        model: nn.Module,
        calibration_batches: CalibrationBatches,
        bits: int | Mapping[str, int],
        progress: Progress = silent,
    ) -> QuantizedModel:
        """`model` quantized to `bits` bits and not tuned; see `compress.quantization.quantize`."""
        return quantize_with(self, model, calibration_batches, bits, progress)

    def at_rates(self, model: nn.Module, calibration_batches: CalibrationBatches) -> RateQuantization:
        """`model` at any rate; see there."""
        return RateQuantization(self, model, calibration_batches)

    def variants(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        measures: Measures,
        progress: Progress,
        tuning_batches: Sequence[Tensor] = (),
    ) -> Iterator[Variant]:
        """What becomes of `model` under these options: one variant for each width and rate, or the one searched for.

        batches: images for quantization, tuning_batches: those for `tune`; left out, the same.
        """
        tuned = self._tuner(model, batches, tuning_batches or batches)
        if self.latency is not None:
            assert measures.runtime is not None  # whoever asks for a latency measures it
            yield self._within_latency(self.latency, model, batches, measures.runtime, progress, tuned)
            return
        for width in self.widths:
            quantized = tuned(self(model, batches, width, progress), progress)
            yield Variant(f"{width} bit", f"{width}bit", quantized, width, self.grid.levels(width))
        if not self.searches and not self.coded_rates:
            return
        at_rate = self.at_rates(model, batches)
        for rate in self.coded_rates:
            found = tuned(at_rate(rate, progress), progress)
            bits = rate if abs(found.rate - rate) <= MISSED * rate else round(found.rate, 2)
            yield Variant(f"{bits} bits/weight", f"{rate}bpw", found, bits, None)
        if self.budget is not None:
            budget = budget_bytes(self.budget, measures.float_bytes)
            # Tuning leaves a file as large as it is.
            yield _found("budget", tuned(within_budget(at_rate, budget, measures, progress), progress))
        elif self.max_drop is not None:

            def walk(rate: float) -> QuantizedModel:
                return tuned(at_rate.walk(rate, progress), progress)

            yield _found("drop", smallest_within_drop(walk, model, self.max_drop, measures))

    def _check_latency(self, latency: str | float) -> None:
        limit_ms(latency, float_ms=1.0)  # only to refuse what is no latency
        for key in ("budget", "max_drop", "rates"):
            if getattr(self, key) not in (None, []):
                raise UserError(f"{key}: found it beside latency; accepted: one of the two")
        if len(self.widths) != 1:
            raise UserError(f"bits: found {[*self.widths]} beside latency; accepted: one width, or null for {WIDTH}")
        if self.activation_bits is None:
            raise UserError(
                "activation_bits: found null beside latency, and a layer is not faster with float inputs; accepted: 2 "
                "to 8"
            )

    def _within_latency(
        self,
        latency: str | float,
        model: nn.Module,
        batches: Sequence[Tensor],
        runtime: Runtime,
        progress: Progress,
        tuned: Callable[[QuantizedModel, Progress], QuantizedModel],
    ) -> Variant:
        [width] = self.widths
        search = LatencySearch(self, model, batches, width, latency, runtime, progress)
        for floats in search.floats():
            partly = replace(self, skip=[*self.skip, *as_patterns(floats)])
            found = tuned(partly(model, batches, width, progress), progress)
            if search.keeps(found):
                break
        reasons = found.skipped | dict.fromkeys(floats, f"latency: float, for {latency}")
        found = replace(found, skipped=reasons)
        label = f"{width} bit for {latency}"
        return Variant(label, "latency", found, width, self.grid.levels(width), search.saved_ms)

    def _tuner(
        self, model: nn.Module, batches: Sequence[Tensor], images: Sequence[Tensor]
    ) -> Callable[[QuantizedModel, Progress], QuantizedModel]:
        if self.tune is None:
            return lambda quantized, progress: quantized
        return Tuner(self.tune, prepare(model, batches, self.skip), images)


def _found(word: str, quantized: QuantizedModel) -> Variant:
    rate = round(quantized.rate, 3)
    return Variant(f"{rate} bits/weight", word, quantized, rate, None)
