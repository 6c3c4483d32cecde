"""Better codes and scales for a layer that a solver has answered, by the exact error of its outputs.

The error of a row q is q G q^T - 2 q C w^T and a constant, see `compress.quantization.solvers.layer_error`; rows do
not depend on each other, so many scales can be tried as so many rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.quantization.grid import Grid
from compress.quantization.solvers import layer_error

Solver = Callable[[Tensor, Tensor, Tensor, Grid], Tensor]


@dataclass(frozen=True)
class Refinement:
    """What becomes of a solver's answer: the best of `candidates` scales, then `sweeps` of coordinate descent.

    Candidates are spread evenly from 0.7 to 1.2 times the scale that the grid came with. With `refit` the scales are
    fitted to the codes after every sweep. One candidate and no sweep leave the answer as it is. `shared`: all channels
    have one scale, and are to keep one.
    """

    candidates: int = 1
    sweeps: int = 0
    refit: bool = False
    shared: bool = False

    def __call__(
        self,
        solver: Solver,
        weight: Tensor,
        gram: Tensor,
        cross: Tensor,
        grid: Grid,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Grid]:
        """Codes (N, d) and grid of one group of a layer; shapes are those of `solver`."""
        if self.candidates > 1:
            factors = torch.linspace(0.7, 1.2, self.candidates).tolist()
            codes, grid = search_scales(weight, gram, cross, grid, solver, factors, mask, self.shared)
        else:
            # A solver without a mask need not know of masks.
            codes = solver(weight, gram, cross, grid, **({} if mask is None else {"mask": mask}))
        for _ in range(self.sweeps):
            codes = coordinate_descent(weight, codes, gram, cross, grid, sweeps=1, mask=mask)
            if self.refit:
                grid = refit_scales(weight, codes, gram, cross, grid, self.shared)
        return codes, grid


@torch.no_grad()
def search_scales(
    weight: Tensor,
    gram: Tensor,
    cross: Tensor,
    grid: Grid,
    solver: Solver,
    factors: Sequence[float],
    mask: Tensor | None = None,
    shared: bool = False,
) -> tuple[Tensor, Grid]:
    """Codes (N, d) by `solver` and their grid: of the scales `grid.scale * factor`, each row's of least error.

    All `len(factors) * N` rows are solved at once; `shared`: the factor of least error in sum is that of all rows.
    Shapes are those of `solver`.
    """
    rows, count = weight.shape[0], len(factors)
    scales = torch.cat([grid.scale * factor for factor in factors])
    tried = Grid(scales, grid.zero_point.repeat(count), grid.levels)
    repeated = weight.repeat(count, 1)
    # A solver without a mask need not know of masks.
    codes = solver(repeated, gram, cross, tried, **({} if mask is None else {"mask": mask.repeat(count, 1)}))
    errors = layer_error(repeated, codes, gram, cross, tried).reshape(count, rows)
    if shared:
        errors = errors.sum(1, keepdim=True).expand_as(errors)
    best = errors.argmin(0) * rows + torch.arange(rows, device=errors.device)
    return codes[best], tried.rows(best)


@torch.no_grad()
def coordinate_descent(
    weight: Tensor,
    codes: Tensor,
    gram: Tensor,
    cross: Tensor,
    grid: Grid,
    sweeps: int = 4,
    block_size: int = 128,
    mask: Tensor | None = None,
) -> Tensor:
    """Codes (N, d), each column in turn replaced by the best one given all others, `sweeps` times over.

    No step raises the error of a row. It ends early where a sweep changes nothing. Columns without inputs stay, and so
    does what `mask` (N, d) has as False.
    """
    dtype = gram.dtype
    scale, zero_point = grid.scale.to(dtype), grid.zero_point.to(dtype)
    lowest, highest = -zero_point, grid.levels - 1 - zero_point
    # Columns along dimension 0, in units of each row's scale: (d, N).
    solved = (codes.T.to(dtype) - zero_point).contiguous()
    gradient = cross @ (weight.T.to(dtype) / scale) - gram @ solved
    diagonal = gram.diagonal().tolist()
    count = solved.shape[0]
    for _ in range(sweeps):
        changed = False
        for start in range(0, count, block_size):
            stop = min(start + block_size, count)
            before = solved[start:stop].clone()
            block = gradient[start:stop].clone()
            inner = gram[start:stop, start:stop]
            for step in range(stop - start):
                if diagonal[start + step] <= 0:
                    continue
                z = solved[start + step]
                best = (z + block[step] / diagonal[start + step]).round_().clamp_(lowest, highest)
                if mask is not None:
                    best = torch.where(mask[:, start + step], best, z)
                block.addr_(inner[:, step], best - z, alpha=-1)
                z.copy_(best)
            moved = solved[start:stop] - before
            if bool(moved.any()):
                changed = True
                gradient.addmm_(gram[:, start:stop], moved, alpha=-1)
        if not changed:
            break
    return (solved + zero_point).T.to(codes.dtype).contiguous()


@torch.no_grad()
def refit_scales(weight: Tensor, codes: Tensor, gram: Tensor, cross: Tensor, grid: Grid, shared: bool = False) -> Grid:
    """The grid whose scales have the least error for these codes: s = (z C w^T) / (z G z^T), z = code - zero_point.

    A row keeps its scale where that is not above zero or z G z^T is zero. `shared`: one scale, of both sums over rows.
    """
    z = (codes.to(torch.int32) - grid.zero_point.to(torch.int32)[:, None]).to(gram.dtype)
    energy = ((z @ gram) * z).sum(1)
    overlap = ((weight.to(gram.dtype) @ cross.T) * z).sum(1)
    if shared:
        energy, overlap = energy.sum().expand_as(energy), overlap.sum().expand_as(overlap)
    scale = overlap / torch.where(energy > 0, energy, 1.0)
    scale = scale.to(grid.scale.dtype)
    usable = (energy > 0) & torch.isfinite(scale) & (scale > 0)
    return Grid(torch.where(usable, scale, grid.scale), grid.zero_point, grid.levels)
