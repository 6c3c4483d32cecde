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
        if self.sweeps:
            codes, grid = coordinate_descent(
                weight, codes, gram, cross, grid, self.sweeps, mask=mask, refit=self.refit, shared=self.shared
            )
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

    The solver is asked once, for `len(factors)` answers; `shared`: the factor of least error in sum is that of all
    rows. Shapes are those of `solver`.
    """
    rows, count = weight.shape[0], len(factors)
    scales = torch.cat([grid.scale * factor for factor in factors])
    tried = Grid(scales, grid.zero_point.repeat(count), grid.levels)
    # A solver without a mask need not know of masks.
    codes = solver(weight, gram, cross, tried, **({} if mask is None else {"mask": mask}))
    errors = layer_error(weight, codes, gram, cross, tried).reshape(count, rows)
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
    refit: bool = False,
    shared: bool = False,
) -> tuple[Tensor, Grid]:
    """Codes (N, d) and their grid: each column in turn replaced by the best one given all others, `sweeps` times over.

    With `refit` the scales are fitted to the codes after every sweep, see `refit_scales`. No step raises the error of a
    row. It ends early where a sweep changes nothing. Columns without inputs stay, and so does what `mask` (N, d) has as
    False.
    """
    dtype = gram.dtype
    zero_point = grid.zero_point.to(dtype)
    lowest, highest = -zero_point, grid.levels - 1 - zero_point
    # Columns along dimension 0, in units of each row's scale: (d, N). The products with the Grams outlive a change of
    # the scales, and a change of the codes is added to them.
    solved = (codes.T.to(dtype) - zero_point).contiguous()
    target = cross @ weight.T.to(dtype)
    product = gram @ solved
    diagonal = gram.diagonal().tolist()
    rows = solved.unbind(0)
    for sweep in range(sweeps):
        scale = grid.scale.to(dtype)
        changed = False
        for start in range(0, len(rows), block_size):
            stop = min(start + block_size, len(rows))
            before = solved[start:stop].clone()
            gradient = (target[start:stop] / scale).sub_(product[start:stop])
            inner = gram[start:stop, start:stop].contiguous()
            for step, (z, own) in enumerate(zip(rows[start:stop], gradient.unbind(0), strict=True)):
                if diagonal[start + step] <= 0:
                    continue
                best = torch.add(z, own, alpha=1 / diagonal[start + step]).round_().clamp_(lowest, highest)
                if mask is not None:
                    best = torch.where(mask[:, start + step], best, z)
                gradient.addr_(inner[step], best - z, alpha=-1)
                z.copy_(best)
            moved = solved[start:stop] - before
            if bool(moved.any()):
                changed = True
                product.addmm_(gram[:, start:stop], moved)
        if not changed and (sweep or not refit):
            break
        if refit:
            grid = refit_scales(grid, (target * solved).sum(0), (product * solved).sum(0), shared)
    return (solved + zero_point).T.to(codes.dtype).contiguous(), grid


def refit_scales(grid: Grid, overlap: Tensor, energy: Tensor, shared: bool = False) -> Grid:
    """The grid whose scales have the least error for given codes: s = (z C w^T) / (z G z^T), z = code - zero_point.

    overlap (N,) is z C w^T and energy (N,) is z G z^T. A row keeps its scale where that is not above zero or its energy
    is zero. `shared`: one scale, of both sums over rows.
    """
    if shared:
        energy, overlap = energy.sum().expand_as(energy), overlap.sum().expand_as(overlap)
    scale = overlap / torch.where(energy > 0, energy, 1.0)
    scale = scale.to(grid.scale.dtype)
    usable = (energy > 0) & torch.isfinite(scale) & (scale > 0)
    return Grid(torch.where(usable, scale, grid.scale), grid.zero_point, grid.levels)
