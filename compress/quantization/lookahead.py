"""Columns decided one after the other, each in view of those that come after it.

The error of a column is passed on to the columns that are still open, and each is decided for what these will then make
up for: their values may be any real numbers, at the price of `ridge` times the square of how far they leave what they
were. With a ridge of zero that is error diffusion as in GPTQ, which finds the nearest plane of Babai (Chen et al. 2025,
2507.18553); with an infinite one the others stay, and it is path following for the first pass and coordinate descent
for those that come after. Where bits have a price an open column will mostly be zero again, whatever it could make up
for, and what lies in between is better than both ends.
"""

import torch
from torch import Tensor

from compress.quantization.problem import DecideBlock, product
from compress.quantization.solvers.path_following import follow
from compress.quantization.survivors import ChooseBlock, follow_survivors

# The least part of the energy of a column that the others cannot make up for.
OWN = 1e-4
# The ridge is at least this share of the sum of the diagonal, which mostly keeps rounding from leaving the matrix
# indefinite; otherwise it is taken ten times as large, up to TIMES - 1 times.
ROUNDING, TIMES = 1e-6, 8
# Where the ridge is best, in units of the mean energy of a column times the variance of rounding over that of the
# weights: 1 to 4 are alike.
RIDGE = 2.0


class Lookahead:
    """One order of the columns of a layer, for any number of passes.

    gram: (d, d), or (N, d, d) for rows with inputs of their own. ridge: 0-dimensional, or (N,). order: (d,), the
    columns as they are decided.
    """

    def __init__(self, gram: Tensor, ridge: Tensor, order: Tensor) -> None:
        self.order = order
        ordered = gram.index_select(-2, order).index_select(-1, order)
        energy = ordered.diagonal(dim1=-2, dim2=-1)
        smallest = (ROUNDING * energy.sum(-1)).clamp_min(torch.finfo(gram.dtype).tiny)
        ridge = torch.maximum(ridge, smallest)[..., None]
        self.factor, ridge = factored(ordered, ridge)
        # Its square is what is left of a column's energy, and the ridge, once those after it have made up for theirs.
        diagonal = self.factor.diagonal(dim1=-2, dim2=-1)
        # The ridge is on the open columns only, so that its part of the column itself is taken off again.
        own = torch.maximum(diagonal.square() - ridge, OWN * energy).masked_fill_(energy <= 0, 0)
        self.scale = diagonal.reshape(-1, len(order)).T  # (d, 1) or (d, N)
        self.matrix = self.factor * diagonal[..., None]
        self.matrix.diagonal(dim1=-2, dim2=-1).copy_(own)
        # What is lost by a unit of its square where an open column leaves its reference, and others do not follow.
        self.credit = (ridge * own / (ridge + own)).reshape(-1, len(order)).T

    def __call__(
        self, reference: Tensor, gradient: Tensor, keep: Tensor | None, block_size: int, decide_block: DecideBlock
    ) -> Tensor:
        """What has been decided of all columns, (d, N).

        reference: (d, N), where they are. gradient: (d, N), half of what the error falls by for a unit more of each.
        keep: (d, N), 0 where a weight is pruned and its reference is zero. `decide_block` as for `follow`.
        """
        values, keep = self._values(reference, gradient), None if keep is None else keep[self.order]
        return self._in_place(follow(values, self.matrix, keep, block_size, decide_block))

    def with_survivors(
        self, reference: Tensor, gradient: Tensor, keep: Tensor | None, count: int, choose_block: ChooseBlock
    ) -> Tensor:
        """The same with `count` survivors of each row, see `follow_survivors`."""
        values, keep = self._values(reference, gradient), None if keep is None else keep[self.order]
        ordered = reference[self.order]
        return self._in_place(follow_survivors(values, self.matrix, self.credit, ordered, keep, count, choose_block))

    def _values(self, reference: Tensor, gradient: Tensor) -> Tensor:
        passed = _solve(self.factor, gradient[self.order]) * self.scale
        return product(self.matrix, reference[self.order]).add_(passed)

    def _in_place(self, decided: Tensor) -> Tensor:
        return torch.empty_like(decided).index_copy_(0, self.order, decided)


def both_ways(gram: Tensor, rounding: float) -> tuple[Lookahead, Lookahead]:
    """From the columns of most energy to those of least, and back; in turn they are better than either.

    rounding: step^2 / 12 over the mean square of the weights.
    """
    ridge, order = ridge_and_order(gram, rounding)
    return Lookahead(gram, ridge, order.flip(0)), Lookahead(gram, ridge, order)


def ridge_and_order(gram: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """(the best ridge, the columns from least energy to most); rows with Grams of their own share the mean's order."""
    energy = gram.diagonal(dim1=-2, dim2=-1)
    order = energy.reshape(-1, energy.shape[-1]).mean(0).argsort(stable=True)
    return RIDGE * rounding * energy.mean(-1), order


def factored(gram: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """(the lower triangular R with gram + ridge = R^T R, the ridge that was needed), ridge (..., 1)."""
    for _ in range(TIMES):
        # R^T R is the product of a Cholesky factor with the columns in the opposite order.
        turned = gram.flip(-2, -1)
        turned.diagonal(dim1=-2, dim2=-1).add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(turned)
        if not bool(failed.any()):
            return factor.mT.flip(-2, -1), ridge
        ridge = 10 * ridge
    raise ArithmeticError("a Gram matrix that no ridge makes positive definite")


def _solve(factor: Tensor, columns: Tensor) -> Tensor:
    """The solution y of R^T y = columns, (d, N)."""
    if factor.dim() == 2:
        solution: Tensor = torch.linalg.solve_triangular(factor.mT, columns, upper=True)
        return solution
    apart: Tensor = torch.linalg.solve_triangular(factor.mT, columns.T[..., None], upper=True)
    return apart[..., 0].T
