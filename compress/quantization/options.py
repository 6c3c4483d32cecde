"""What can be chosen of post-training quantization: frozen dataclasses that declare each option once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from compress.arguments import check_fields
from compress.errors import UserError
from compress.quantization.activations import Activations
from compress.quantization.moments import GramOptions
from compress.quantization.problem import Solver
from compress.quantization.refinement import Refinement
from compress.quantization.scales import GridOptions
from compress.quantization.solvers import GPFQ

Bits = Annotated[int, Field(ge=2, le=16)]
# Called as progress(done, of how many, what is being done).
Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, what: str) -> None:
    """A `Progress` that shows nothing."""


@dataclass(frozen=True)
class Correction:
    """What is corrected after a layer's codes are chosen.

    bias: centre the Grams and move the mean output error into the bias. batch_norm: give the channels back the mean and
    deviation that they had in float, see `compress.quantization.batch_norm`; it needs a scale for each channel.
    """

    bias: bool = True
    batch_norm: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How `compress.quantization.quantize` answers each layer.

    first_last_bits: bits of the first and the last Conv2d or Linear in execution order, skipped or not, and of their
    inputs, which have at most 8; None: as the others. activation_bits: of the inputs of the quantized layers; None:
    float inputs. skip: names or globs of layers that stay float.
    """

    solver: Solver = field(default_factory=GPFQ)
    first_last_bits: Bits | None = 8
    activation_bits: Annotated[int, Field(ge=2, le=8)] | None = None
    skip: Sequence[str] = ()
    grid: GridOptions = field(default_factory=GridOptions)
    activations: Activations = field(default_factory=Activations)
    refinement: Refinement = field(default_factory=Refinement)
    correction: Correction = field(default_factory=Correction)
    grams: GramOptions = field(default_factory=GramOptions)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.correction.batch_norm and self.grid.granularity == "layer":
            raise UserError("correction.batch_norm: found true with one scale a layer; accepted: granularity channel")
        if self.refinement != Refinement() and not self.solver.reads_inputs:
            raise UserError(
                f"refinement: found sweeps, scale_candidates or refit for {self.solver.name}, which reads no inputs; "
                "accepted: 0, 1 and false, or another solver"
            )
