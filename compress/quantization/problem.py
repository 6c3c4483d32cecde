"""One layer's quantization as a problem in its Gram matrices, and what a solver of such problems is.

With X the analog and X~ the quantized inputs of a layer, (samples, d), the output error of a row q of quantized
weights is |X w - X~ q|^2 = q G q^T - 2 q C w^T + |X w|^2, where G = X~^T X~ and C = X~^T X.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress.arguments import check_fields
from compress.quantization.grid import Grid

# Columns of a symmetric product that are made at once.
STRIPE = 512
# Columns of a block on a GPU, where the first two of a walk are launched and all others replayed.
FEW = 32
# Turns the best values (M,) of the column of that number in a block, in units of the scales, to codes in place.
Decide = Callable[[int, Tensor], None]
# Makes it for a block, given 1 / G[t, t] of its columns: (b, 1), or (b, N) where rows have Grams of their own.
DecideBlock = Callable[[Tensor], Decide]


@dataclass(frozen=True)
class Problem:
    """What a solver is given of one group of a layer.

    weight: (N, d). gram, cross: (d, d), G and C above, or (N, d, d) for rows with inputs of their own, see
    `Solver.rows_apart`; empty for a solver that does not read the inputs. grid: of the N rows, or of K N rows for K
    candidate scales of each row, whose solutions are stacked in that order; what they share is computed once.
    mask: (N, d), False where a weight is pruned and has to stay zero; None where no weight is.
    """

    weight: Tensor
    gram: Tensor
    cross: Tensor
    grid: Grid
    mask: Tensor | None = None

    def repeat_for_candidates(self, rows: Tensor) -> Tensor:
        """`rows` (N, ...) once for each of the K candidates, (K N, ...)."""
        count = self.grid.scale.shape[0] // rows.shape[0]
        return rows if count == 1 else rows.repeat(count, *[1] * (rows.dim() - 1))

    def error(self, codes: Tensor) -> Tensor:
        """Output error of each row of `codes`, (N,) or (K N,), less the constant |X w|^2: q G q^T - 2 q C w^T.

        It ranks the candidates of one row exactly. In the dtype of `gram`.
        """
        quantized = self.grid.dequantize(codes).to(self.gram.dtype)
        target = product(self.cross, self.weight.to(self.gram.dtype).T).T
        overlap: Tensor = (quantized.unflatten(0, (-1, self.weight.shape[0])) * target).sum(2).flatten()
        return _energy(quantized, self.gram).sub(overlap, alpha=2)


@dataclass(frozen=True)
class Solver(ABC):
    """Chooses the codes of a `Problem`; a subclass is a frozen dataclass whose fields are its options.

    `name` stands in tables and file names. A solver whose `reads_inputs` is False needs no Grams, and the walk over the
    network saves itself their cost where nothing else reads them. One whose `rows_apart` is True takes problems with
    Grams (N, d, d), and is given all groups of a depthwise convolution at once, otherwise each by itself. One whose
    `has_price` is True stands for `compress.quantization.rate_distortion` where networks have rates.
    """

    reads_inputs: ClassVar[bool] = True
    rows_apart: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    def has_price(self) -> bool:
        return False

    @abstractmethod
    def __call__(self, problem: Problem) -> Tensor:
        """Codes (N, d), or (K N, d) for a grid of K N rows: `code_dtype` of the grid's levels, from 0 to levels - 1."""


def product(matrix: Tensor, columns: Tensor) -> Tensor:
    """`matrix` (d, d), or one for each column (N, d, d), times `columns` (d, N): (d, N)."""
    if matrix.dim() == 2:
        return matrix @ columns
    apart: Tensor = torch.linalg.vecdot(matrix, columns.T[:, None])
    return apart.T.contiguous()


def columns_together(gram: Tensor, block_size: int) -> int:
    """How many columns of a layer are decided before the later ones are told: `block_size`, and on a GPU at most FEW.

    All of them where rows have Grams (N, d, d) of their own, which have few columns.
    """
    if gram.dim() == 3:
        return gram.shape[-1]
    return min(block_size, FEW) if gram.is_cuda else block_size


def rows_last(matrix: Tensor) -> Tensor:
    """`matrix` (d, d) as (d, d, 1), or one for each row (N, d, d) as (d, d, N), so that it broadcasts with rows."""
    return (matrix[:, :, None] if matrix.dim() == 2 else matrix.permute(1, 2, 0)).contiguous()


def reciprocal(diagonal: Tensor) -> Tensor:
    """1 / diagonal, 0 where that is not above zero: a column without inputs."""
    return torch.where(diagonal > 0, diagonal.reciprocal(), 0.0)


def _energy(rows: Tensor, gram: Tensor) -> Tensor:
    """r G r^T of each of `rows` (M, d): (M,). G is symmetric, so that the part above its diagonal counts twice."""
    if gram.dim() == 3:
        candidates: Tensor = rows.unflatten(0, (-1, gram.shape[0])).transpose(0, 1)
        return (candidates @ gram).mul_(candidates).sum(2).T.flatten()
    total = rows.new_zeros(rows.shape[0])
    for index in torch.arange(rows.shape[1]).split(STRIPE):
        start, stop = int(index[0]), int(index[-1]) + 1
        part = rows[:, start:stop]
        product = part @ gram[start:stop, start:stop]
        if start:
            product.addmm_(rows[:, :start], gram[:start, start:stop], alpha=2)
        total += product.mul_(part).sum(1)
    return total
