"""Choosing a layer's codes from its Grams: greedy path following (GPFQ, SPFQ), GPTQ, Qronos, rounding to the nearest.

All take weight (N, d), gram (d, d) = X~^T X~, cross (d, d) = X~^T X, with X analog and X~ quantized inputs (samples,
d), and a grid of N channels, and give codes (N, d). They compute in the dtype of `gram` unless they say otherwise.
With a mask (N, d), a weight where that is False is pruned: it takes zero, and the others make up for it.
A grid of K N channels asks for K answers, (K N, d), one after the other: what they have in common is computed once.
"""

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import UserError
from compress.quantization.grid import Grid, code_dtype

NotNegative = Annotated[float, Field(ge=0)]
Damping = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# Columns of a symmetric product that are made at once.
STRIPE = 512


def rtn(
    weight: Tensor,
    gram: Tensor | None,
    cross: Tensor | None,
    grid: Grid,
    block_size: int = 128,
    mask: Tensor | None = None,
) -> Tensor:
    """Codes (N, d) of the grid points nearest to `weight` (N, d); the Grams are not looked at and may be None."""
    return grid.quantize(_for_each(grid, weight if mask is None else weight * mask))


def _for_each(grid: Grid, rows: Tensor) -> Tensor:
    """`rows` (N, ...) once for each answer that `grid` asks for."""
    count = grid.scale.shape[0] // rows.shape[0]
    return rows if count == 1 else rows.repeat(count, *[1] * (rows.dim() - 1))


# The walk over the network spares itself the Grams where neither the solver nor the scale reads them.
rtn.reads_inputs = False


def gpfq(
    weight: Tensor,
    gram: Tensor,
    cross: Tensor,
    grid: Grid,
    block_size: int = 128,
    mask: Tensor | None = None,
    soft_threshold: NotNegative = 0.0,
    hard_threshold: NotNegative = 0.0,
) -> Tensor:
    """Codes (N, d), uint8 where they fit and int32 otherwise, by greedy path following.

    Lybrand & Saab 2020; Zhang, Zhou & Saab 2022 (2201.11113), restated in Grams: for t = 1..d,
    q_t = Q((sum_{j<=t} cross[t,j] w_j - sum_{j<t} gram[t,j] q_j) / gram[t,t]). A column without inputs (gram[t,t] = 0)
    takes q_t = 0. The thresholds, in units of the weights, make weights sparse (2201.11113, section 5): before it is
    rounded, what lies below becomes zero, and `soft_threshold` shrinks the rest by as much. `block_size` columns are
    corrected at once for all that went before them; it changes the speed only.
    """
    if not soft_threshold and not hard_threshold:
        return _follow_path(weight, gram, cross, grid, block_size, mask, Tensor.round_)
    scale = grid.scale.to(gram.dtype)

    def decide(values: Tensor) -> Tensor:
        if soft_threshold:
            values.copy_(torch.nn.functional.softshrink(values * scale, soft_threshold) / scale)
        if hard_threshold:
            values.masked_fill_((values * scale).abs() <= hard_threshold, 0)
        return values.round_()

    return _follow_path(weight, gram, cross, grid, block_size, mask, decide)


def spfq(
    weight: Tensor,
    gram: Tensor,
    cross: Tensor,
    grid: Grid,
    block_size: int = 128,
    mask: Tensor | None = None,
    seed: Seed = 0,
) -> Tensor:
    """As `gpfq`, each step rounded up or down at random so that its mean is exact (Zhang & Saab 2023, 2309.10975)."""
    generator = torch.Generator(gram.device).manual_seed(seed)

    def decide(values: Tensor) -> Tensor:
        draws = torch.rand(values.shape, generator=generator, dtype=values.dtype, device=values.device)
        return values.add_(draws).floor_()

    return _follow_path(weight, gram, cross, grid, block_size, mask, decide)


@torch.no_grad()
def _follow_path(
    weight: Tensor,
    gram: Tensor,
    cross: Tensor,
    grid: Grid,
    block_size: int,
    mask: Tensor | None,
    decide: Callable[[Tensor], Tensor],
) -> Tensor:
    """`gpfq` with `decide`, which turns the values of one step (N,), in units of the scales, to integers in place."""
    dtype = gram.dtype
    codes = grid.zero_point.to(code_dtype(grid.levels))[:, None].repeat(1, weight.shape[1])
    diagonal = gram.diagonal()
    live = diagonal > 0
    if not bool(live.any()):
        return codes
    all_live = bool(live.all())
    keep = None if mask is None else _for_each(grid, mask).T.to(dtype)
    if not all_live:
        keep = None if keep is None else keep[live]
        # A dead column adds nothing to any numerator: <x~_t, .> = 0 in its own row and q_t = 0 elsewhere. It does add
        # C[t', t] w_t to later rows where only the quantized input died, so the analog side keeps all its columns.
        gram = gram[live][:, live]
        diagonal = diagonal[live]
    # Work in units of each row's scale, so that rounding needs no division: z = q / scale = code - zero_point.
    # Columns lie along dimension 0, which keeps the row of one step contiguous.
    scale, zero_point = grid.scale.to(dtype), grid.zero_point.to(dtype)
    target = _numerators(weight.to(dtype), cross, live if not all_live else None, block_size)
    target = target.repeat(1, scale.shape[0] // weight.shape[0]) / scale
    lowest, highest = -zero_point, grid.levels - 1 - zero_point
    reciprocal = diagonal.reciprocal().tolist()
    count = target.shape[0]
    solved = torch.empty_like(target)
    for start in range(0, count, block_size):
        stop = min(start + block_size, count)
        block = target[start:stop]
        if start:
            block.addmm_(gram[start:stop, :start], solved[:start], alpha=-1)
        # Column t of the transposed copy is contiguous: the weights with which step t reaches the later ones.
        inner = gram[start:stop, start:stop].T.contiguous()
        for step in range(stop - start):
            z = solved[start + step]
            torch.mul(block[step], reciprocal[start + step], out=z)
            decide(z)
            torch.clamp(z, lowest, highest, out=z)
            if keep is not None:
                z.mul_(keep[start + step])
            if step + 1 < stop - start:
                block[step + 1 :].addr_(inner[step, step + 1 :], z, alpha=-1)
    found = solved.T.add_(zero_point[:, None]).to(codes.dtype)
    if all_live:
        return found.contiguous()
    codes[:, live] = found
    return codes


def _numerators(weight: Tensor, cross: Tensor, live: Tensor | None, block_size: int) -> Tensor:
    """tril(cross) @ weight^T, its rows limited to `live`: (d, N), without a triangular copy of all of `cross`."""
    weight = weight.T.contiguous()
    index = torch.arange(cross.shape[0], device=cross.device) if live is None else live.nonzero()[:, 0]
    block_size = max(block_size, 512)
    out = []
    for rows in index.split(block_size):
        first, last = int(rows[0]), int(rows[-1])
        block = cross[first : last + 1] if live is None else cross[rows]
        columns = torch.arange(first, last + 1, device=cross.device)
        mixed = block[:, first : last + 1] * (columns[None, :] <= rows[:, None])
        part = mixed @ weight[first : last + 1]
        if first:
            part.addmm_(block[:, :first], weight[:first])
        out.append(part)
    return torch.cat(out)


@torch.no_grad()
def gptq(
    weight: Tensor,
    gram: Tensor,
    cross: Tensor,
    grid: Grid,
    block_size: int = 128,
    mask: Tensor | None = None,
    damping: Damping = 0.01,
) -> Tensor:
    """Codes (N, d): each column rounded, its error made up for by the later columns (Frantar 2022, 2210.17323).

    Errors of earlier layers are not corrected: `cross` is not looked at. `damping` times the mean of diag(gram) is
    added to the diagonal. Computed in float64.
    """
    return _diffuse(weight.double(), gram.double(), grid, block_size, mask, damping)


@torch.no_grad()
def qronos(
    weight: Tensor,
    gram: Tensor,
    cross: Tensor,
    grid: Grid,
    block_size: int = 128,
    mask: Tensor | None = None,
    damping: Damping = 1e-3,
) -> Tensor:
    """Codes (N, d): each column the best for the layer's analog outputs, given the earlier codes (2505.11695).

    After each column the later weights are solved again by least squares on the quantized inputs, which is what
    `gptq` does from the second column on, once they have been solved for the first. `damping` as in `gptq`.
    """
    weight, gram, cross = weight.double(), gram.double(), cross.double()
    scale, zero_point = grid.scale.double(), grid.zero_point.double()
    target = weight @ cross.T  # (N, d): <x~_t, X w>
    # A first column without inputs takes zero: nothing is left of it either way.
    first = (target[:, 0] - weight[:, 1:] @ gram[1:, 0]) / gram[0, 0].clamp_min(torch.finfo(torch.float64).tiny)
    target, first, weight = (_for_each(grid, each) for each in (target, first, weight))
    mask = None if mask is None else _for_each(grid, mask)
    first_code = ((first / scale).round() + zero_point).clamp_(0, grid.levels - 1)
    if mask is not None:
        first_code = torch.where(mask[:, 0], first_code, zero_point)
    if weight.shape[1] == 1:
        return first_code[:, None].to(code_dtype(grid.levels))
    rest = gram[1:, 1:]
    left = target[:, 1:] - ((first_code - zero_point) * scale)[:, None] * gram[1:, 0]
    # Damped towards the weights as they are, which a column without inputs keeps.
    added = _damping(rest, damping)
    solved = torch.cholesky_solve((left + added * weight[:, 1:]).T, _cholesky(rest + added.diag())).T
    codes = _diffuse(solved, rest, grid, block_size, None if mask is None else mask[:, 1:], damping)
    return torch.cat([first_code[:, None].to(codes.dtype), codes], dim=1)


def _damping(gram: Tensor, damping: float) -> Tensor:
    """(d,): what is added to the diagonal; 1 where all inputs are zero, so that the matrix has an inverse."""
    mean = gram.diagonal().mean()
    return (damping * mean if mean > 0 else torch.ones_like(mean)).expand(gram.shape[0])


def _cholesky(matrix: Tensor, upper: bool = False) -> Tensor:
    try:
        return torch.linalg.cholesky(matrix, upper=upper)
    except torch.linalg.LinAlgError:
        raise UserError(
            "quantizer.solver.damping: found one too small for inputs that depend on each other; accepted: more, or "
            "more calibration images"
        ) from None


def _diffuse(weight: Tensor, gram: Tensor, grid: Grid, block_size: int, mask: Tensor | None, damping: float) -> Tensor:
    """Codes of `weight` (N, d), column by column, the error spread by the Cholesky factor of the inverse of `gram`."""
    scale, zero_point = grid.scale.double(), grid.zero_point.double()
    inverse = torch.cholesky_inverse(_cholesky(gram + _damping(gram, damping).diag()))
    factor = _cholesky(inverse, upper=True)
    # Columns lie along dimension 0, which keeps the row of one step contiguous.
    left = (_for_each(grid, weight) / scale[:, None]).T.contiguous()
    mask = None if mask is None else _for_each(grid, mask)
    lowest, highest = -zero_point, grid.levels - 1 - zero_point
    for start in range(0, left.shape[0], block_size):
        stop = min(start + block_size, left.shape[0])
        errors = torch.empty_like(left[start:stop])
        for step in range(start, stop):
            rounded = left[step].round().clamp_(lowest, highest)
            if mask is not None:
                rounded *= mask[:, step]
            errors[step - start] = (left[step] - rounded) / factor[step, step]
            left[step] = rounded
            if step + 1 < stop:
                left[step + 1 : stop].addr_(factor[step, step + 1 : stop], errors[step - start], alpha=-1)
        if stop < left.shape[0]:
            left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    codes = (left.T + zero_point[:, None]).to(code_dtype(grid.levels))
    # What a column without inputs is rounded to changes nothing; zero packs and prunes best.
    dead = gram.diagonal() <= 0
    codes[:, dead] = grid.zero_point.to(codes.dtype)[:, None]
    return codes.contiguous()


def layer_error(weight: Tensor, codes: Tensor, gram: Tensor, cross: Tensor, grid: Grid) -> Tensor:
    """Output error of each row of codes, (N,) or (K N,), less the constant |X w|^2: q G q^T - 2 q C w^T.

    Equal to |X w - X~ q|^2 - |X w|^2 summed over the samples, so it ranks candidates of one row exactly. In the dtype
    of `gram`.
    """
    quantized = grid.dequantize(codes).to(gram.dtype)
    overlap = (quantized.unflatten(0, (-1, weight.shape[0])) * (weight.to(gram.dtype) @ cross.T)).sum(2).flatten()
    return _energy(quantized, gram) - 2 * overlap


def _energy(rows: Tensor, gram: Tensor) -> Tensor:
    """r G r^T of each of `rows` (M, d): (M,). G is symmetric, so that the part above its diagonal counts twice."""
    total = rows.new_zeros(rows.shape[0])
    for index in torch.arange(rows.shape[1]).split(STRIPE):
        start, stop = int(index[0]), int(index[-1]) + 1
        part = rows[:, start:stop]
        product = part @ gram[start:stop, start:stop]
        if start:
            product.addmm_(rows[:, :start], gram[:start, start:stop], alpha=2)
        total += product.mul_(part).sum(1)
    return total
