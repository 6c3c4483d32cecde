"""Uniform grids, one per output channel, and the rules that choose their scales.

value = scale * (code - zero_point), codes 0..levels-1. Zero is on every grid, so a pruned weight stays exactly zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Elements worked on at a time, so that a pass over the candidates stays in the cache.
CHUNK = 1 << 16
# From so many levels on, one level more on a side is no gain.
FINE = 64
ZeroPoint = Literal["symmetric", "mirrored", "affine"]


def code_dtype(levels: int) -> torch.dtype:
    return torch.uint8 if levels <= 256 else torch.int32


@dataclass(frozen=True)
class Grid:
    """Per-channel grid: `scale` (N,) positive floats, `zero_point` (N,) integers in 0..levels-1.

    Raises ValueError, naming the value, for anything else.
    """

    scale: Tensor
    zero_point: Tensor
    levels: int

    def __post_init__(self) -> None:
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or not 2 <= self.levels <= 2**16 + 1:
            raise ValueError(f"levels: {self.levels!r}; a grid has 2 to {2**16 + 1} levels")
        if self.scale.dim() != 1 or not self.scale.is_floating_point():
            raise ValueError(f"scale: {self.scale.dtype} {tuple(self.scale.shape)}; floats of shape (N,) are needed")
        if not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
            bad = self.scale[~(torch.isfinite(self.scale) & (self.scale > 0))][0].item()
            raise ValueError(f"scale: {bad}; every scale is finite and above 0")
        whole = not (self.zero_point.is_floating_point() or self.zero_point.dtype == torch.bool)
        if not whole or self.zero_point.shape != self.scale.shape:
            found = f"{self.zero_point.dtype} {tuple(self.zero_point.shape)}"
            raise ValueError(f"zero_point: {found}; integers of shape {tuple(self.scale.shape)} are needed")
        outside = (self.zero_point < 0) | (self.zero_point >= self.levels)
        if bool(outside.any()):
            bad = self.zero_point[outside][0].item()
            raise ValueError(f"zero_point: {bad}; with {self.levels} levels it lies in 0..{self.levels - 1}")

    @property
    def bits(self) -> int:
        """Bits a packed code takes: ceil(log2(levels))."""
        return (self.levels - 1).bit_length()

    def rows(self, index) -> "Grid":
        """The grid of the channels that `index` (a slice or an index tensor) selects."""
        return Grid(self.scale[index], self.zero_point[index], self.levels)

    def repeat(self, count: int) -> "Grid":
        """The grid of `count` copies of all channels, one copy after the other: (count * N,)."""
        return Grid(self.scale.repeat(count), self.zero_point.repeat(count), self.levels)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values (N, ...) of codes (N, ...), in the dtype of `scale`."""
        shape = (-1, *[1] * (codes.dim() - 1))
        offset = codes.to(torch.int32) - self.zero_point.to(torch.int32).reshape(shape)
        return offset.to(self.scale.dtype) * self.scale.reshape(shape)

    def quantize(self, values: Tensor) -> Tensor:
        """Codes (N, ...) of the nearest grid points to `values` (N, ...), uint8 where they fit and int32 otherwise."""
        shape = (-1, *[1] * (values.dim() - 1))
        steps = torch.round(values / self.scale.to(values.dtype).reshape(shape))
        codes = steps.add_(self.zero_point.to(values.dtype).reshape(shape)).clamp_(0, self.levels - 1)
        return codes.to(code_dtype(self.levels))


def max_abs_grid(weight: Tensor, levels: int, importance: Tensor | None = None) -> Grid:
    """Per channel of `weight` (N, d), levels spread evenly over [-max|w|, max|w|]: scale = 2 max|w| / (levels - 1).

    The symmetric rule of PyTorch's min-max observers, zero_point levels // 2. `importance` is not used.
    """
    scale = weight.abs().amax(1) * (2 / (levels - 1))
    return Grid(_positive(scale), torch.full_like(scale, levels // 2, dtype=torch.int32), levels)


def percentile_grid(
    weight: Tensor,
    levels: int,
    importance: Tensor | None = None,
    *,
    percentile: float = 1.0,
    scalar: float = 1.16,
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
    rows = max(1, CHUNK // max(1, weight.shape[1]))
    parts = [
        _mse_rows(
            weight[start : start + rows],
            levels,
            None if importance is None else importance[start : start + rows],
            candidates,
        )
        for start in range(0, weight.shape[0], rows)
    ]
    return Grid(torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts]), levels)


def one_for_the_layer(choose: Callable[..., Grid]) -> Callable[..., Grid]:
    """A rule that chooses one scale and zero point for all channels, as `choose` does for a single one."""

    def chosen(weight: Tensor, levels: int, importance: Tensor | None = None) -> Grid:
        if importance is not None:
            importance = importance.expand_as(weight).reshape(1, -1)
        return choose(weight.reshape(1, -1), levels, importance).repeat(weight.shape[0])

    return chosen


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
