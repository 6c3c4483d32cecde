"""Rules that choose the grid of a layer from its weights, and the options that name one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.arguments import check_fields
from compress.quantization.grid import Grid

# Elements worked on at a time, so that a pass over the candidates stays in the cache.
CHUNK = 1 << 16
# And on a GPU, which is to have enough to do.
CHUNK_OF_GPU = 1 << 24
# From so many levels on, one level more on a side is no gain.
FINE = 64
ZeroPoint = Literal["symmetric", "mirrored", "affine"]


@dataclass(frozen=True)
class GridOptions:
    """How the grids of a network are chosen.

    alphabet: "exact" is 2^bits levels, "published" 2^bits + 1, as in the authors' code, "narrow" 2^bits - 1, as many on
    either side of zero. scale: `mse_grid`, `max_abs_grid`, or `percentile_grid`, which alone reads `percentile` and
    `alphabet_scalar`. zero_point: of the grids that "mse" chooses. granularity: a scale for each output channel, or one
    for the layer.
    """

    alphabet: Literal["exact", "published", "narrow"] = "exact"
    scale: Literal["mse", "max_abs", "percentile"] = "mse"
    percentile: Annotated[float, Field(gt=0, le=1)] = 1.0
    alphabet_scalar: Annotated[float, Field(gt=0)] = 1.16
    zero_point: ZeroPoint = "mirrored"
    granularity: Literal["channel", "layer"] = "channel"

    def __post_init__(self) -> None:
        check_fields(self)

    def levels(self, bits: int) -> int:
        """Levels of a grid of `bits` bits; at least 2, as a single bit without its lowest code would be one level."""
        return max(2, (1 << bits) + {"exact": 0, "published": 1, "narrow": -1}[self.alphabet])

    def choose(self, weight: Tensor, levels: int, importance: Tensor | None = None) -> Grid:
        """The grid of `weight` (N, d); importance (d,) or (N, d) is the mean square of each input (None: all equal)."""
        rules: dict[str, Callable[..., Grid]] = {
            "mse": partial(mse_grid, zero_point=self.zero_point),
            "max_abs": max_abs_grid,
            "percentile": partial(percentile_grid, percentile=self.percentile, scalar=self.alphabet_scalar),
        }
        rule = rules[self.scale]
        if self.granularity == "channel":
            return rule(weight, levels, importance)
        if importance is not None:
            importance = importance.expand_as(weight).reshape(1, -1)
        return rule(weight.reshape(1, -1), levels, importance).repeat(weight.shape[0])


def max_abs_grid(weight: Tensor, levels: int, importance: Tensor | None = None) -> Grid:
    """Per channel of `weight` (N, d), levels spread evenly over [-max|w|, max|w|]: scale = 2 max|w| / (levels - 1).

    The symmetric rule of PyTorch's min-max observers, zero_point levels // 2. `importance` is not used.
    """
    scale = weight.abs().amax(1) * (2 / (levels - 1))
    return Grid(_positive(scale), torch.full_like(scale, levels // 2, dtype=torch.int32), levels)


def percentile_grid(
    weight: Tensor, levels: int, importance: Tensor | None = None, *, percentile: float, scalar: float
) -> Grid:
    """One scale for the whole layer, as in the published GPFQ code: `scalar` * radius / (levels // 2).

    radius is the mean over channels of the `percentile` quantile (0..1) of |w|. Rule and defaults: `_quantize_layer` in
    src/step_algorithm.py and src/main.py of github.com/YixuanSeanZhou/Quantized_Neural_Nets. `importance` is not used.
    """
    # torch.quantile refuses more than 2**24 elements at once.
    rows = max(1, (1 << 24) // max(1, weight.shape[1]))
    radius = torch.cat([chunk.abs().quantile(percentile, dim=1) for chunk in weight.split(rows)]).mean()
    scale = (scalar * radius / (levels // 2)).expand(weight.shape[0]).contiguous()
    return Grid(_positive(scale), torch.full_like(scale, levels // 2, dtype=torch.int32), levels)


def mse_grid(
    weight: Tensor, levels: int, importance: Tensor | None = None, *, zero_point: ZeroPoint = "mirrored"
) -> Grid:
    """Per channel, the scale and the zero point of least sum_t importance_t (w_t - nearest(w_t))^2.

    weight (N, d); importance (d,) or (N, d) is diag(G), the mean square of each input (None: all equal). Candidates are
    spread geometrically below the scale at which the shorter side reaches max|w|, then refined around the best.
    Zero points are levels // 2 ("symmetric"), that or its mirror image, whichever side needs the odd level
    ("mirrored"; no difference from FINE levels on, where integer kernels want one for all channels), or any ("affine").
    """
    candidates = _zero_points(levels, zero_point)
    if importance is not None:
        importance = importance.to(weight.dtype).clamp_min(0)
        used = importance > 0
        if importance.dim() == 1 and bool(used.any()):
            # A column without inputs costs nothing wherever it is rounded to.
            weight, importance, used = weight[:, used], importance[used], used[used]
        importance = importance.expand_as(weight)
        # So it must not set the range either, unless nothing else does.
        weight = torch.where(used | ~(used & (weight != 0)).any(1, keepdim=True), weight, 0.0)
    rows = max(1, (CHUNK_OF_GPU if weight.is_cuda else CHUNK) // max(1, weight.shape[1]))
    chunks = weight.split(rows)
    shares = [None] * len(chunks) if importance is None else importance.split(rows)
    parts = [_mse_rows(chunk, levels, share, candidates) for chunk, share in zip(chunks, shares, strict=True)]
    return Grid(torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts]), levels)


def _zero_points(levels: int, kind: ZeroPoint) -> tuple[int, ...]:
    if kind == "affine":
        # Beyond that many, neighbours differ by less than the rounding of the weights.
        return tuple(range(0, levels, max(1, levels // FINE)))
    if kind == "symmetric" or levels % 2 or levels >= FINE:
        return (levels // 2,)
    return (levels // 2, levels // 2 - 1)


def _positive(scale: Tensor) -> Tensor:
    # A channel of zeros has no scale of its own; any will do, and 1 is exact.
    return torch.where(scale > 0, scale, 1.0)


def _mse_rows(
    weight: Tensor, levels: int, importance: Tensor | None, zero_points: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """(scale, zero_point) of a few rows."""
    largest = weight.abs().amax(1)
    if importance is not None:
        # Where none of a row's non-zero weights has an input, all count the same.
        importance = torch.where(((importance > 0) & (weight != 0)).any(1, keepdim=True), importance, 1.0)
    # No scale above this one does better: at it even the shorter side reaches the largest weight.
    top = _positive(largest / max(1, (levels - 1) // 2))
    # Narrower grids pay off at few levels only, where clipping the tails buys resolution.
    bottom = 0.1 if levels <= 16 else 0.3
    ratio = bottom ** (1 / 15)
    best_scale, _ = _best_of(weight, levels, importance, top, [ratio**step for step in range(16)], zero_points)
    fine = [ratio ** (step / 6) for step in range(-5, 6)]
    best_scale, best_zero = _best_of(weight, levels, importance, best_scale, fine, zero_points)
    return torch.where(largest > 0, best_scale, 1.0), best_zero


def _best_of(
    weight: Tensor,
    levels: int,
    importance: Tensor | None,
    around: Tensor,
    factors: list[float],
    zero_points: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """The best (scale, zero_point) of each row among the scales `around` * factor and the zero points."""
    best_scale = around.clone()
    best_zero = torch.full_like(around, levels // 2, dtype=torch.int32)
    best_error = torch.full_like(around, float("inf"))
    for factor in factors:
        scale = around * factor
        steps = weight / scale[:, None]
        rounded = steps.round()
        for zero_point in zero_points:
            error = rounded.clamp(-zero_point, levels - 1 - zero_point).sub_(steps).square_()
            error = error.sum(1) if importance is None else torch.linalg.vecdot(error, importance)
            error = error * scale.square()
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero_point, best_zero)
    return best_scale, best_zero
