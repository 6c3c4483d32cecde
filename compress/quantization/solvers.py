"""Choosing a layer's codes from its Grams: greedy path following (GPFQ) and rounding to the nearest.

GPFQ: Lybrand & Saab 2020; Zhang, Zhou & Saab 2022 (2201.11113), restated in the Gram matrices of the inputs.
"""

import torch
from torch import Tensor

from compress.quantization.grid import Grid, code_dtype


def rtn(weight: Tensor, gram: Tensor | None, cross: Tensor | None, grid: Grid, block_size: int = 128) -> Tensor:
    """Codes (N, d) of the grid points nearest to `weight` (N, d); the Grams are not looked at and may be None."""
    return grid.quantize(weight)


# The walk over the network spares itself the Grams where neither the solver nor the scale reads them.
rtn.reads_inputs = False


@torch.no_grad()
def gpfq(weight: Tensor, gram: Tensor, cross: Tensor, grid: Grid, block_size: int = 128) -> Tensor:
    """Codes (N, d), uint8 where they fit and int32 otherwise, by greedy path following.

    weight (N, d) analog weights; gram (d, d) = X~^T X~; cross (d, d) = X~^T X, with X analog and X~ quantized inputs
    (samples, d). For t = 1..d, q_t = Q((sum_{j<=t} cross[t,j] w_j - sum_{j<t} gram[t,j] q_j) / gram[t,t]), the
    published step written without the samples. A column without inputs (gram[t,t] = 0) takes q_t = 0.
    Computed in the dtype of `gram`. `block_size` columns are corrected at once for all that went before them; it
    changes the speed only.
    """
    dtype = gram.dtype
    codes = grid.zero_point.to(code_dtype(grid.levels))[:, None].repeat(1, weight.shape[1])
    diagonal = gram.diagonal()
    live = diagonal > 0
    if not bool(live.any()):
        return codes
    all_live = bool(live.all())
    if not all_live:
        # A dead column adds nothing to any numerator: <x~_t, .> = 0 in its own row and q_t = 0 elsewhere. It does add
        # C[t', t] w_t to later rows where only the quantized input died, so the analog side keeps all its columns.
        gram = gram[live][:, live]
        diagonal = diagonal[live]
    # Work in units of each row's scale, so that rounding needs no division: z = q / scale = code - zero_point.
    # Columns lie along dimension 0, which keeps the row of one step contiguous.
    scale, zero_point = grid.scale.to(dtype), grid.zero_point.to(dtype)
    target = _numerators(weight.to(dtype), cross, live if not all_live else None, block_size) / scale
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
            z.round_()
            torch.clamp(z, lowest, highest, out=z)
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


def layer_error(weight: Tensor, codes: Tensor, gram: Tensor, cross: Tensor, grid: Grid) -> Tensor:
    """Output error of each row, (N,), less the constant |X w|^2: q G q^T - 2 q C w^T, in the dtype of `gram`.

    Equal to |X w - X~ q|^2 - |X w|^2 summed over the samples, so it ranks candidates of one row exactly.
    """
    quantized = grid.dequantize(codes).to(gram.dtype)
    return ((quantized @ gram - 2 * (weight.to(gram.dtype) @ cross.T)) * quantized).sum(1)
