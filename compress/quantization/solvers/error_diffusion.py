"""Error diffusion: each column rounded, its error made up for by the later columns, in float64.

GPTQ: Frantar et al. 2022 (2210.17323). Qronos: 2505.11695.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import UserError
from compress.quantization.grid import Grid, code_dtype
from compress.quantization.problem import Problem, Solver

Damping = Annotated[float, Field(gt=0)]
BlockSize = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class GPTQ(Solver):
    """Errors of earlier layers are not corrected: `cross` is not read.

    `damping` times the mean of diag(gram) is added to the diagonal. `block_size` columns pass their errors on to the
    later ones at once; it changes the speed only.
    """

    damping: Damping = 0.01
    block_size: BlockSize = 128

    @torch.no_grad()
    def __call__(self, problem: Problem) -> Tensor:
        weight = problem.repeat_for_candidates(problem.weight.double())
        mask = None if problem.mask is None else problem.repeat_for_candidates(problem.mask)
        return _diffuse(weight, problem.gram.double(), problem.grid, self.block_size, mask, self.damping)


@dataclass(frozen=True)
class Qronos(Solver):
    """Each column the best for the layer's analog outputs, given the earlier codes.

    After each column the later weights are solved again by least squares on the quantized inputs, which is what
    `GPTQ` does from the second column on, once they have been solved for the first. Options as those of `GPTQ`.
    """

    damping: Damping = 1e-3
    block_size: BlockSize = 128

    @torch.no_grad()
    def __call__(self, problem: Problem) -> Tensor:
        grid = problem.grid
        weight, gram, cross = problem.weight.double(), problem.gram.double(), problem.cross.double()
        scale, zero_point = grid.scale.double(), grid.zero_point.double()
        target = weight @ cross.T  # (N, d): <x~_t, X w>
        # A first column without inputs takes zero: its numerator and its Gram are zero.
        first = (target[:, 0] - weight[:, 1:] @ gram[1:, 0]) / gram[0, 0].clamp_min(torch.finfo(torch.float64).tiny)
        target, first, weight = map(problem.repeat_for_candidates, (target, first, weight))
        mask = None if problem.mask is None else problem.repeat_for_candidates(problem.mask)
        first_code = ((first / scale).round() + zero_point).clamp_(0, grid.levels - 1)
        if mask is not None:
            first_code = torch.where(mask[:, 0], first_code, zero_point)
        if weight.shape[1] == 1:
            return first_code[:, None].to(code_dtype(grid.levels))
        rest = gram[1:, 1:]
        remaining = target[:, 1:] - ((first_code - zero_point) * scale)[:, None] * gram[1:, 0]
        # Damped towards the weights as they are, which a column without inputs keeps.
        added = _damping(rest, self.damping)
        solved = torch.cholesky_solve((remaining + added * weight[:, 1:]).T, _cholesky(rest + added.diag())).T
        mask = None if mask is None else mask[:, 1:]
        codes = _diffuse(solved, rest, grid, self.block_size, mask, self.damping)
        return torch.cat([first_code[:, None].to(codes.dtype), codes], dim=1)


def _damping(gram: Tensor, damping: float) -> Tensor:
    """(d,): what is added to the diagonal; 1 where all inputs are zero, so that the matrix has an inverse."""
    mean = gram.diagonal().mean()
    return (damping * mean if mean > 0 else torch.ones_like(mean)).expand(gram.shape[0])


def _cholesky(matrix: Tensor, upper: bool = False) -> Tensor:
    try:
        factor: Tensor = torch.linalg.cholesky(matrix, upper=upper)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # documented, but not in its __all__
        raise UserError(
            "quantizer.solver.damping: found one too small for inputs that depend on each other; accepted: more, or "
            "more calibration images"
        ) from None
    return factor


def _diffuse(weight: Tensor, gram: Tensor, grid: Grid, block_size: int, mask: Tensor | None, damping: float) -> Tensor:
    """Codes of `weight` (N, d), column by column, the error spread by the Cholesky factor of the inverse of `gram`.

    Columns lie along dimension 0, which keeps the row of one step contiguous.
    """
    scale, zero_point = grid.scale.double(), grid.zero_point.double()
    inverse = torch.cholesky_inverse(_cholesky(gram + _damping(gram, damping).diag()))
    factor = _cholesky(inverse, upper=True)
    values = (weight / scale[:, None]).T.contiguous()
    lowest, highest = -zero_point, grid.levels - 1 - zero_point
    for start in range(0, values.shape[0], block_size):
        stop = min(start + block_size, values.shape[0])
        errors = torch.empty_like(values[start:stop])
        for step in range(start, stop):
            rounded = values[step].round().clamp_(lowest, highest)
            if mask is not None:
                rounded *= mask[:, step]
            errors[step - start] = (values[step] - rounded) / factor[step, step]
            values[step] = rounded
            if step + 1 < stop:
                values[step + 1 : stop].addr_(factor[step, step + 1 : stop], errors[step - start], alpha=-1)
        if stop < values.shape[0]:
            values[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    codes = (values.T + zero_point[:, None]).to(code_dtype(grid.levels))
    # What a column without inputs is rounded to changes nothing; zero packs and prunes best.
    dead = gram.diagonal() <= 0
    codes[:, dead] = grid.zero_point.to(codes.dtype)[:, None]
    return codes.contiguous()
