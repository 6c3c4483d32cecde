"""Rows of a layer decided one after the other, each in view of those that come after it.

What errors of two outputs do to the logits can cancel, and an output that hardly matters may have a large one. So the
error that counts is tr(S E G E^T) with E the error of the weight, G the Gram of its inputs and S the coupling of its
rows, the products of the gradients of its outputs: Kronecker-factored curvature (Martens & Grosse 2015, 1503.05671, of
convolutions Grosse & Martens 2016, 1602.01407), by which Tseng, Sun & De Sa 2025 (2505.22988) round with feedback along
both dimensions. Rows are to S what columns are to G, so they have a lookahead with a ridge of their own, see
`compress.quantization.lookahead`: a row is decided for what open rows will then make up for, all its columns at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from compress.quantization.lookahead import OWN, factored, ridge_and_order
from compress.quantization.problem import product

# Rows that are decided together, each as if the others stayed, as a column of a few rows takes as long as one of many:
# this share of all, in the last pass with a lookahead that one; but at least LEAST, and on a GPU ON_GPU.
SHARE, FINE, LEAST, ON_GPU = 1 / 8, 1 / 32, 8, 64
# How many times its own energy a row is decided with where others move together with it: this share of the largest
# eigenvalue of their coupling, for which 1 is safe and 0.5 the least that cannot run away.
SAFE = 0.7
# The numbers (b,) of rows, or all of them; and what the square of an output error of each counts, (b,), or of all.
Rows = Tensor | slice
Own = Tensor | float
# Codes (d, b) of rows, given the numbers of these (b,), half of what the error falls by for a unit more of each weight
# (d, b) in that unit, and what the square of an output error of each counts.
DecideRows = Callable[[Rows, Tensor, Own], Tensor]


class CoupledRows:
    """The rows of one layer.

    coupling: S (N, N), symmetric and positive definite. rounding: as for `both_ways`.
    """

    def __init__(self, coupling: Tensor, rounding: float) -> None:
        self.coupling = coupling
        ridge, order = ridge_and_order(coupling, rounding)
        self.ways = _Way(coupling, ridge, order.flip(0)), _Way(coupling, ridge, order)

    def look_ahead(
        self, way: int, fine: bool, codes: Tensor, moments: Tensor, gradient: Tensor, gram: Tensor, decide: DecideRows
    ) -> None:
        """New `codes` (d, N) and `moments` = G codes, in place, in one of two orders of the rows.

        gradient: (d, N), that of each row if it were alone. fine: whether few rows are decided together.
        """
        one = self.ways[way]
        passed = torch.linalg.solve_triangular(one.factor.mT, (gradient @ self.coupling)[:, one.order].T, upper=True)
        moved = torch.empty_like(passed)  # G times what was decided less what was before, (N, d)
        for block in _blocks(len(self.coupling), FINE if fine else SHARE, gram):
            inner, before = one.factor[block, block], one.factor[block, : block.start]
            rows, own = one.order[block], one.own(block)
            wanted = inner.T @ (passed[block] - before @ moved[: block.start])
            found = decide(rows, (wanted / own[:, None]).T.contiguous(), own)
            after = product(gram, found)
            moved[block] = (after - moments[:, rows]).T
            codes[:, rows], moments[:, rows] = found, after

    def sweep(self, codes: Tensor, moments: Tensor, target: Tensor, gram: Tensor, decide: DecideRows) -> None:
        """The same by coordinate descent: all other rows stay; `target` (d, N) is that of `moments`."""
        for rows in _blocks(len(self.coupling), SHARE, gram):
            own = _safe(self.coupling[rows, rows])
            found = decide(rows, (target - moments) @ self.coupling[:, rows] / own, own)
            codes[:, rows], moments[:, rows] = found, product(gram, found)


class _Way:
    """One order of the rows: `factor` (N, N) of S in that order."""

    def __init__(self, coupling: Tensor, ridge: Tensor, order: Tensor) -> None:
        self.order = order
        ordered = coupling[order][:, order]
        self.least = OWN * ordered.diagonal()
        self.factor, self.ridge = factored(ordered, ridge)

    def own(self, block: slice) -> Tensor:
        """What the square of each row of a block counts, once those after it have made up for theirs."""
        inner = self.factor[block, block]
        left = inner.T @ inner
        # The ridge is on the rows after the block only.
        left.diagonal().sub_(self.ridge).clamp_min_(self.least[block])
        return _safe(left)


def _blocks(count: int, share: float, gram: Tensor) -> list[slice]:
    together = max(round(share * count), ON_GPU if gram.is_cuda else LEAST)
    return [slice(start, min(start + together, count)) for start in range(0, count, together)]


def _safe(block: Tensor) -> Tensor:
    """The diagonal of a coupling (b, b), larger where rows that move together would overshoot."""
    diagonal = block.diagonal()
    sizes = diagonal.rsqrt()
    largest = torch.linalg.eigvalsh(sizes[:, None] * block * sizes)[-1]
    safe: Tensor = diagonal * (SAFE * largest).clamp_min(1)
    return safe
