"""Uniform grids, one per output channel.

value = scale * (code - zero_point), codes 0..levels-1. Zero is on every grid, so a pruned weight stays exactly zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def code_dtype(levels: int) -> torch.dtype:
    return torch.uint8 if levels <= 256 else torch.int32


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """`values` (N,) in a shape that broadcasts with `like` (N, ...)."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


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
        integers = not (self.zero_point.is_floating_point() or self.zero_point.dtype == torch.bool)
        if not integers or self.zero_point.shape != self.scale.shape:
            actual = f"{self.zero_point.dtype} {tuple(self.zero_point.shape)}"
            raise ValueError(f"zero_point: {actual}; integers of shape {tuple(self.scale.shape)} are needed")
        outside = (self.zero_point < 0) | (self.zero_point >= self.levels)
        if bool(outside.any()):
            bad = self.zero_point[outside][0].item()
            raise ValueError(f"zero_point: {bad}; with {self.levels} levels it lies in 0..{self.levels - 1}")

    @property
    def bits(self) -> int:
        """Bits a packed code takes: ceil(log2(levels))."""
        return (self.levels - 1).bit_length()

    def rows(self, index: slice | Tensor) -> "Grid":
        """The grid of the channels that `index` (a slice or an index tensor) selects."""
        return Grid(self.scale[index], self.zero_point[index], self.levels)

    def repeat(self, count: int) -> "Grid":
        """The grid of `count` copies of all channels, one copy after the other: (count * N,)."""
        return Grid(self.scale.repeat(count), self.zero_point.repeat(count), self.levels)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values (N, ...) of codes (N, ...), in the dtype of `scale`."""
        offset = codes.to(torch.int32) - per_channel(self.zero_point.to(torch.int32), codes)
        return offset.to(self.scale.dtype) * per_channel(self.scale, codes)

    def quantize(self, values: Tensor) -> Tensor:
        """Codes (N, ...) of the nearest grid points to `values` (N, ...), uint8 where they fit and int32 otherwise."""
        steps = torch.round(values / per_channel(self.scale.to(values.dtype), values))
        codes = steps.add_(per_channel(self.zero_point.to(values.dtype), values)).clamp_(0, self.levels - 1)
        return codes.to(code_dtype(self.levels))


def spanning(steps: Tensor, scale: float, dtype: torch.dtype) -> tuple[Grid, Tensor]:
    """The smallest grid that has all of the whole numbers `steps` (N, ...), and their codes on it.

    `scale`, in `dtype`, is that of all N channels. Zero is in the middle, levels // 2, so that the signed integers of
    any runtime hold the steps themselves.
    """
    below, above = -int(steps.min()), int(steps.max())
    levels = max(2, 2 * below if below > above else 2 * above + 1)
    scales = torch.full((len(steps),), scale, dtype=dtype, device=steps.device)
    zero_points = torch.full((len(steps),), levels // 2, dtype=torch.int32, device=steps.device)
    return Grid(scales, zero_points, levels), (steps + levels // 2).to(code_dtype(levels))
