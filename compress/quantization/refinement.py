"""Better codes and scales for a layer that a solver has answered, by the exact error of its outputs.

The error is that of `compress.quantization.problem.Problem.error`; rows do not depend on each other, so many scales can
be tried as so many rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compress.arguments import check_fields
from compress.cuda_graph import Walk
from compress.quantization.grid import Grid
from compress.quantization.lookahead import both_ways
from compress.quantization.problem import (
    Decide,
    DecideBlock,
    Problem,
    Solver,
    columns_together,
    product,
    reciprocal,
    rows_last,
)
from compress.quantization.survivors import NEVER, Choose


@dataclass(frozen=True)
class Refinement:
    """What becomes of a solver's answer: the best of `scale_candidates` scales, then `sweeps` over its codes.

    Candidates are spread evenly from 0.7 to 1.2 times the scale that the grid came with. Sweeps, and `refit`, are those
    of `refine_codes`. One candidate and no sweep leave the answer as it is. survivors: how many answers to a row are in
    the race in sweeps with a lookahead, and in the first pass of a rate, see `compress.quantization.survivors`.
    coupled_rows: whether, at a rate, errors of output channels may make up for each other in the logits, see
    `compress.quantization.coupled_rows`.
    """

    scale_candidates: Annotated[int, Field(ge=1, le=64)] = 1
    sweeps: Annotated[int, Field(ge=0)] = 0
    refit: bool = False
    survivors: Annotated[int, Field(ge=1, le=64)] = 1
    coupled_rows: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, solver: Solver, problem: Problem, shared: bool = False) -> tuple[Tensor, Grid]:
        """Codes (N, d) and grid of one group of a layer; `shared`: all its rows have one scale, and are to keep one."""
        if self.scale_candidates > 1:
            factors = torch.linspace(0.7, 1.2, self.scale_candidates).tolist()
            codes, grid = search_scales(problem, solver, factors, shared)
        else:
            codes, grid = solver(problem), problem.grid
        if self.sweeps:
            problem = replace(problem, grid=grid)
            codes, grid = refine_codes(
                problem, codes, self.sweeps, refit=self.refit, shared=shared, survivors=self.survivors
            )
        return codes, grid


@torch.no_grad()
def search_scales(
    problem: Problem, solver: Solver, factors: Sequence[float], shared: bool = False
) -> tuple[Tensor, Grid]:
    """Codes (N, d) by `solver` and their grid: of the scales `grid.scale * factor`, each row's of least error.

    The solver is asked once, for `len(factors)` answers; `shared`: the factor of least error in sum is that of all
    rows.
    """
    grid, rows, count = problem.grid, problem.weight.shape[0], len(factors)
    scales = torch.cat([grid.scale * factor for factor in factors])
    tried = replace(problem, grid=Grid(scales, grid.zero_point.repeat(count), grid.levels))
    codes = solver(tried)
    errors = tried.error(codes).reshape(count, rows)
    if shared:
        errors = errors.sum(1, keepdim=True).expand_as(errors)
    best = errors.argmin(0) * rows + torch.arange(rows, device=errors.device)
    return codes[best], tried.grid.rows(best)


@torch.no_grad()
def refine_codes(
    problem: Problem,
    codes: Tensor,
    sweeps: int = 4,
    block_size: int = 128,
    refit: bool = False,
    shared: bool = False,
    survivors: int = 1,
) -> tuple[Tensor, Grid]:
    """Codes (N, d) and their grid after `sweeps`: all but the last with a lookahead, the last by coordinate descent.

    Coordinate descent replaces each column in turn by the best one given all others. With `refit` the scales are fitted
    to the codes after every sweep, see `refit_scales`. No sweep raises the error of a row: with a lookahead, a row
    stays as it is where it would. Pruned weights stay zero. survivors: of each row, in passes with a lookahead.
    """
    grid, gram = problem.grid, problem.gram
    zero_point = grid.zero_point.to(gram.dtype)
    lowest, highest = -zero_point, grid.levels - 1 - zero_point

    def decide(column: int, values: Tensor) -> None:
        torch.clamp(values.round_(), lowest, highest, out=values)

    def decide_block(inverse: Tensor) -> Decide:
        return decide

    def choose_block(inverse: Tensor, rows: slice) -> Choose:
        low, high = lowest[rows], highest[rows]

        def choose(column: int, values: Tensor) -> tuple[Tensor, Tensor]:
            first = torch.clamp(values.round(), low, high)
            second = first + torch.where(values < first, -1.0, 1.0)
            off = (second < low) | (second > high)
            return torch.stack([first, second]), torch.stack([torch.zeros_like(values), NEVER * off])

        return choose

    # Columns along dimension 0, in units of each row's scale: (d, N). The products with the Grams outlive a change of
    # the scales, and a change of the codes is added to them.
    solved = (codes.T.to(gram.dtype) - zero_point).contiguous()
    target = product(problem.cross, problem.weight.T.to(gram.dtype))
    moments = product(gram, solved)
    keep = None if problem.mask is None else problem.mask.T.to(gram.dtype)
    rounding = float(grid.scale.square().mean() / 12 / problem.weight.square().mean())
    lookaheads = both_ways(gram, rounding) if sweeps > 1 and 0 < rounding < math.inf else None
    for left in reversed(range(sweeps)):
        scaled = target / grid.scale.to(gram.dtype)
        if left and lookaheads:
            lookahead = lookaheads[(left - 1) % 2]
            gradient = scaled - moments
            if survivors > 1:
                found = lookahead.with_survivors(solved, gradient, keep, survivors, choose_block)
            else:
                found = lookahead(solved, gradient, keep, block_size, decide_block)
            after = product(gram, found)
            better = (found * (after - 2 * scaled)).sum(0) < (solved * (moments - 2 * scaled)).sum(0)
            solved, moments = torch.where(better, found, solved), torch.where(better, after, moments)
        else:
            sweep_once(scaled, gram, problem.mask, solved, moments, block_size, decide_block)
        if refit:
            grid = refit_scales(grid, (target * solved).sum(0), (moments * solved).sum(0), shared)
    return (solved + zero_point).T.to(codes.dtype).contiguous(), grid


def sweep_once(
    target: Tensor,
    gram: Tensor,
    mask: Tensor | None,
    solved: Tensor,
    moments: Tensor,
    block_size: int,
    decide_block: DecideBlock,
) -> None:
    """One pass over the columns of `solved` (d, N), in units of the scales, as `target`.

    It changes `solved` and `moments` = G solved, both (d, N). What `decide_block` makes turns what would be best of a
    column into codes.
    """
    inverse = reciprocal(rows_last(gram).diagonal().T)  # (d, 1) or (d, N)
    count = len(inverse)
    block_size = columns_together(gram, block_size)

    def walk(best: Tensor, codes: Tensor, scale: Tensor, inner: Tensor, kept: Tensor | None = None) -> None:
        decide = decide_block(scale)
        for column, (values, before) in enumerate(zip(best.unbind(0), codes.unbind(0), strict=True)):
            decide(column, values)
            if kept is not None:
                torch.where(kept[column], values, before, out=values)
            best[column + 1 :].addcmul_(inner[column, column + 1 :], values - before, value=-1)

    walk_block = Walk(walk)
    for start in range(0, count, block_size):
        stop = min(start + block_size, count)
        codes, scale = solved[start:stop], inverse[start:stop]
        best = torch.addcmul(codes, target[start:stop] - moments[start:stop], scale)
        # What a unit of the code of one column takes from what is best of another.
        inner = rows_last(gram[..., start:stop, start:stop]) * scale
        walk_block(best, codes, scale, inner, *([] if mask is None else [mask.T[start:stop].contiguous()]))
        moved = best - codes
        if bool(moved.any()):
            codes.copy_(best)
            if gram.dim() == 2:
                moments.addmm_(gram[:, start:stop], moved)
            else:
                moments += product(gram, moved)


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
