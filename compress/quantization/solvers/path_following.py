"""Greedy path following: each weight rounded so that the layer's outputs so far stay close to the analog ones.

GPFQ: Lybrand & Saab 2020; Zhang, Zhou & Saab 2022 (2201.11113). SPFQ: Zhang & Saab 2023 (2309.10975). Restated in
Grams: for t = 1..d, q_t = Q((sum_{j<=t} cross[t,j] w_j - sum_{j<t} gram[t,j] q_j) / gram[t,t]). A column without inputs
(gram[t,t] = 0) takes q_t = 0. Both compute in the dtype of the Gram.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.cuda_graph import Walk
from compress.quantization.grid import code_dtype
from compress.quantization.problem import (
    STRIPE,
    Decide,
    DecideBlock,
    Problem,
    Solver,
    columns_together,
    product,
    reciprocal,
    rows_last,
)

Threshold = Annotated[float, Field(ge=0)]
BlockSize = Annotated[int, Field(ge=1)]
# Turns the values of one step (M,), in units of the scales, to integers in place.
Round = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GPFQ(Solver):
    """Greedy path following with rounding to the nearest grid point.

    The thresholds, in units of the weights, make weights sparse (2201.11113, section 5): a value below becomes zero
    before it is rounded, and `soft_threshold` shrinks the others by as much. `block_size` columns are corrected at once
    for all that went before them; it changes the speed only.
    """

    rows_apart: ClassVar[bool] = True

    soft_threshold: Threshold = 0.0
    hard_threshold: Threshold = 0.0
    block_size: BlockSize = 128

    @property
    def has_price(self) -> bool:
        return not self.soft_threshold and not self.hard_threshold

    def __call__(self, problem: Problem) -> Tensor:
        if not self.soft_threshold and not self.hard_threshold:
            return follow_path(problem, self.block_size, Tensor.round_)
        scale = problem.grid.scale.to(problem.gram.dtype)

        def decide(values: Tensor) -> Tensor:
            if self.soft_threshold:
                values.copy_(torch.nn.functional.softshrink(values * scale, self.soft_threshold) / scale)
            if self.hard_threshold:
                values.masked_fill_((values * scale).abs() <= self.hard_threshold, 0)
            return values.round_()

        return follow_path(problem, self.block_size, decide)


@dataclass(frozen=True)
class SPFQ(Solver):
    """As `GPFQ`, each value rounded up or down at random so that its mean is exact."""

    rows_apart: ClassVar[bool] = True

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    block_size: BlockSize = 128

    def __call__(self, problem: Problem) -> Tensor:
        return follow_path(problem, self.block_size, Tensor.floor_, torch.Generator().manual_seed(self.seed))


@torch.no_grad()
def follow_path(problem: Problem, block_size: int, rounded: Round, generator: torch.Generator | None = None) -> Tensor:
    """Codes (N, d) by path following; `rounded` rounds the values of a step.

    generator: on the CPU, whose draws from 0 to 1 are added to the values before; None: nothing is.
    """
    grid, dtype = problem.grid, problem.gram.dtype
    codes = grid.zero_point.to(code_dtype(grid.levels))[:, None].repeat(1, problem.weight.shape[1])
    gram, keep, index = problem.gram, None, None
    if problem.mask is not None:
        keep = problem.repeat_for_candidates(problem.mask).T.to(dtype)
    live = gram.diagonal() > 0 if gram.dim() == 2 else None
    if live is not None and not bool(live.all()):
        if not bool(live.any()):
            return codes
        # A dead column adds nothing to any numerator: <x~_t, .> = 0 in its own row and q_t = 0 elsewhere. It does add
        # C[t', t] w_t to later rows where only the quantized input died, so the analog side keeps all its columns.
        gram, keep, index = gram[live][:, live], None if keep is None else keep[live], live.nonzero()[:, 0]
    # Work in units of each row's scale, so that rounding needs no division: z = q / scale = code - zero_point.
    scale, zero_point = grid.scale.to(dtype), grid.zero_point.to(dtype)
    # Where rows have Grams of their own, a dead column has a numerator of 0 and takes zero.
    target = numerators(problem.weight.to(dtype), problem.cross, index, block_size)
    target = target.repeat(1, scale.shape[0] // problem.weight.shape[0]) / scale
    if generator is not None:
        draws = torch.rand(target.shape, generator=generator, dtype=dtype).to(target.device)
        diagonal = rows_last(gram).diagonal().T[:, None]
        target.unflatten(1, (-1, diagonal.shape[2])).addcmul_(draws.unflatten(1, (-1, diagonal.shape[2])), diagonal)
    lowest, highest = -zero_point, grid.levels - 1 - zero_point

    def decide(column: int, values: Tensor) -> None:
        torch.clamp(rounded(values), lowest, highest, out=values)

    def decide_block(inverse: Tensor) -> Decide:
        return decide

    solved = follow(target, gram, keep, block_size, decide_block)
    answer = solved.T.add_(zero_point[:, None]).to(codes.dtype)
    if index is None:
        return answer.contiguous()
    codes[:, live] = answer
    return codes


def follow(target: Tensor, gram: Tensor, keep: Tensor | None, block_size: int, decide_block: DecideBlock) -> Tensor:
    """Steps (d, M), in place of the numerators `target` (d, M) that they come from; `keep` (d, M) is 0 where pruned.

    Columns lie along dimension 0, which keeps the row of one step contiguous. Of `gram` what lies above the diagonal is
    not read.
    """
    inverse = reciprocal(rows_last(gram).diagonal().T)  # (d, 1) or (d, N)
    count, rows = inverse.shape
    block_size = columns_together(gram, block_size)
    # Where rows have Grams of their own, these are shared by the candidates, which lie along a dimension in between.
    apart = (-1, rows)

    def walk(block: Tensor, scale: Tensor, inner: Tensor, keep: Tensor | None = None) -> None:
        decide = decide_block(scale)
        later = block.unflatten(1, apart)
        for step, values in enumerate(block.unbind(0)):
            decide(step, values)
            if keep is not None:
                values.mul_(keep[step])
            later[step + 1 :].addcmul_(inner[step, step + 1 :], values.view(apart), value=-1)

    walk_block = Walk(walk)
    for start in range(0, count, block_size):
        stop = min(start + block_size, count)
        block = target[start:stop]
        if start:
            block.addmm_(gram[start:stop, :start], target[:start], alpha=-1)
        scale = inverse[start:stop]
        block.unflatten(1, apart).mul_(scale[:, None])
        # What a unit of one step takes from a later one. Of the transposed copy a step reads what lies together.
        inner = (rows_last(gram[..., start:stop, start:stop].transpose(-1, -2)) * scale)[:, :, None]
        walk_block(block, scale, inner, *([] if keep is None else [keep[start:stop]]))
    return target


def numerators(weight: Tensor, cross: Tensor, live: Tensor | None, block_size: int) -> Tensor:
    """tril(cross) @ weight^T, (d, N), only the rows `live` (None: all), without a triangular copy of all of `cross`.

    Where rows have a `cross` of their own, (N, d, d), there is such a copy, and `live` is not read.
    """
    if cross.dim() == 3:
        return product(cross.tril(), weight.T)
    weight = weight.T.contiguous()
    index = torch.arange(cross.shape[0], device=cross.device) if live is None else live
    parts = []
    for rows in index.split(max(block_size, STRIPE)):
        first, last = int(rows[0]), int(rows[-1])
        block = cross[first : last + 1] if live is None else cross[rows]
        columns = torch.arange(first, last + 1, device=cross.device)
        mixed = block[:, first : last + 1] * (columns[None, :] <= rows[:, None])
        part = mixed @ weight[first : last + 1]
        if first:
            part.addmm_(block[:, :first], weight[:first])
        parts.append(part)
    return torch.cat(parts)
