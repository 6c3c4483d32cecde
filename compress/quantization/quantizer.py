"""The quantizer that a YAML file describes: `quantize` with its options bound, one call per bit width."""

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor, nn

from compress.quantization.post_training import QuantizedModel, quantize
from compress.quantization.refinement import Refinement

Bits = Annotated[int, Field(ge=2, le=16)]


def _as_list(value):
    return [value] if isinstance(value, int) else value


def _each_once(widths):
    if len(set(widths)) < len(widths):
        raise ValueError("every width once")
    return widths


class Quantizer:
    """Options of `compress.quantization.quantize`, bound; `bits` and `calibration_images` are for the caller to read.

    bits: bit widths to quantize to, one model each. alphabet: "exact" is 2^bits levels, "published" 2^bits + 1,
    "narrow" 2^bits - 1, as many on either side of zero. activation_bits: of the layers' inputs too; None: float.
    calibration_images: how many training images the caller should pass. scale_candidates, sweeps and refit are those of
    `Refinement`, the other arguments those of `quantize`, which checks them too. `name` is the solver's. In YAML
    `solver` is a mapping (`_target_`, `_partial_: true`) from which Hydra makes the callable.
    """

    def __init__(
        self,
        solver: Callable[..., Tensor] | dict[str, Any],
        bits: Annotated[list[Bits], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_each_once)],
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
        scale_candidates: Annotated[int, Field(ge=1, le=64)] = 1,
        sweeps: Annotated[int, Field(ge=0)] = 0,
        refit: bool = False,
        block_size: Annotated[int, Field(ge=1)] = 128,
        gram_dtype: Literal["float32", "float64"] = "float32",
    ) -> None:
        self.name = getattr(solver, "func", solver).__name__
        self.bits = [int(width) for width in _as_list(bits)]
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
            "refine": Refinement(scale_candidates, sweeps, refit),
            "block_size": block_size,
            "gram_dtype": getattr(torch, gram_dtype),
        }

    def levels(self, bits: int) -> int:
        """Levels of the grids of `bits` bits: 2^bits, one more in the published alphabet and one less in the narrow."""
        return 2**bits + {"exact": 0, "published": 1, "narrow": -1}[self.alphabet]

    def __call__(
        self,
        model: nn.Module,
        calibration_batches: Iterable,
        bits: int,
        progress: Callable[[int, int, str, int], None] | None = None,
    ) -> QuantizedModel:
        """`model` quantized to `bits` bits; see `compress.quantization.quantize`."""
        return quantize(model, calibration_batches, bits, progress=progress, **self.options)
