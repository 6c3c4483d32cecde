"""Columns decided one after the other, with several answers to each row in the race until the last of them.

The code that is best for a column is not always best for the row, as all columns after it have to live with it. So each
row keeps the `count` cheapest of its beginnings, its survivors; each of them goes on with the two best codes of the
next column, and the cheapest of these survive (the M-algorithm, Anderson & Mohan 1984). One survivor is `follow`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from compress.quantization.problem import reciprocal, rows_last

# Columns whose residuals are kept for each survivor, and numbers that survivors of rows at a time may take.
BLOCK, TOGETHER = 32, 1 << 26
NEVER = 1e30
# Of values (B, N) of the column of that number in a block, in units of the scales, two codes (2, B, N), the better one
# first, and what each is to cost beside the square of its distance, (2, B, N).
Choose = Callable[[int, Tensor], tuple[Tensor, Tensor]]
# Makes it for a block of rows, given 1 / G[t, t] of its columns: (b, 1), or (b, N) where rows have Grams of their own.
ChooseBlock = Callable[[Tensor, slice], Choose]


@torch.no_grad()
def follow_survivors(
    target: Tensor,
    gram: Tensor,
    credit: Tensor,
    reference: Tensor,
    keep: Tensor | None,
    count: int,
    choose_block: ChooseBlock,
) -> Tensor:
    """Codes (d, N), with `target`, `gram` and `keep` as for `follow`, which stay as they are.

    credit: (d, 1) or (d, N), what an open column has been counted with for the square of how far it leaves its
    `reference` (d, N), which its code takes back. `choose_block` is given the rows, too.
    """
    depth, rows = target.shape
    together = max(1, TOGETHER // (count * depth))
    parts = [slice(start, min(start + together, rows)) for start in range(0, rows, together)]
    return torch.cat([_survivor(part, target, gram, credit, reference, keep, count, choose_block) for part in parts], 1)


def _survivor(
    rows: slice,
    target: Tensor,
    gram: Tensor,
    credit: Tensor,
    reference: Tensor,
    keep: Tensor | None,
    count: int,
    choose_block: ChooseBlock,
) -> Tensor:
    if gram.dim() == 3:
        gram, credit = gram[rows], credit[:, rows]
    target, reference = target[:, rows], reference[:, rows]
    diagonal = rows_last(gram).diagonal().T  # (d, 1) or (d, N)
    inverse = reciprocal(diagonal)
    depth, width = target.shape
    block_size = BLOCK if gram.dim() == 2 else depth  # Grams of their own are of few columns
    costs = target.new_full((count, width), NEVER)
    costs[0] = 0
    decided = target.new_zeros(count, width, depth)
    for start in range(0, depth, block_size):
        stop = min(start + block_size, depth)
        # (b, B, N): what is left of the numerators, for each survivor.
        left = target[start:stop, None].expand(-1, count, -1).clone()
        if start:
            passed = decided[:, :, :start].flatten(0, 1) @ gram[start:stop, :start].T
            left -= passed.unflatten(0, (count, width)).permute(2, 0, 1)
        inner = rows_last(gram[..., start:stop, start:stop])[:, :, None]
        choose = choose_block(inverse[start:stop], rows)
        codes = target.new_zeros(stop - start, count, width)
        origin = torch.arange(count, device=target.device)[:, None].expand(count, width)
        for step in range(stop - start):
            column = start + step
            own = diagonal[column]
            values = left[step] * inverse[column]
            found, penalties = choose(step, values)
            if keep is not None:
                kept = keep[column, rows] > 0
                found = found * kept
                penalties[1] = torch.where(kept, penalties[1], NEVER)
            penalties[1] = torch.where(own > 0, penalties[1], NEVER)
            paid = costs - credit[column] * (values - reference[column]).square()
            after = torch.where(own > 0, own, 1.0) * penalties + own * (found - values).square() + paid
            costs, index = after.flatten(0, 1).topk(count, 0, largest=False)
            parents = index % count
            chosen = found.flatten(0, 1).gather(0, index)
            origin = origin.gather(0, parents)
            if step:
                codes[:step] = codes[:step].gather(1, parents.expand(step, -1, -1))
            codes[step] = chosen
            if step + 1 < stop - start:
                left[step + 1 :] = left[step + 1 :].gather(1, parents.expand(stop - start - step - 1, -1, -1))
                left[step + 1 :].addcmul_(inner[step + 1 :, step], chosen, value=-1)
        if start:
            decided[:, :, :start] = decided[:, :, :start].gather(0, origin[:, :, None].expand(-1, -1, start))
        decided[:, :, start:stop] = codes.permute(1, 2, 0)
    best = costs.argmin(0)
    return decided[best, torch.arange(width, device=best.device)].T
