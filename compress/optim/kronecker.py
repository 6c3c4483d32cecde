"""The matrices of Shampoo: parameters as matrices, matrices as blocks, and inverse roots of their second moments."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def fold(shape: Sequence[int]) -> tuple[int, int, int]:
    """Rows, columns and order k of a parameter `(out, in, kh, kw)` as a matrix `(out, in*kh*kw)`.

    What then has one row or one column is a vector, `(n, 1)` of order 1.
    """
    rows, columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    return (rows, columns, 2) if rows > 1 and columns > 1 else (rows * columns, 1, 1)


def split(matrix: Tensor, size: int) -> list[Tensor]:
    """The blocks of `matrix` `(m, n)`, at most `size` long on a side: one tensor `(b, r, c)` for all of the same shape.

    Each side is cut into pieces of `size` and what remains, so there are at most four shapes.
    """
    return [
        matrix[top:bottom, left:right]
        .reshape((bottom - top) // height, height, (right - left) // width, width)
        .transpose(1, 2)
        .reshape(-1, height, width)
        for top, bottom, height in _spans(matrix.shape[0], size)
        for left, right, width in _spans(matrix.shape[1], size)
    ]


def join(blocks: Sequence[Tensor], rows: int, columns: int, size: int) -> Tensor:
    """The matrix `(rows, columns)` that `split` made `blocks` of."""
    matrix = blocks[0].new_empty(rows, columns)
    remaining = iter(blocks)
    for top, bottom, height in _spans(rows, size):
        for left, right, width in _spans(columns, size):
            grid = next(remaining).view((bottom - top) // height, (right - left) // width, height, width)
            matrix[top:bottom, left:right] = grid.transpose(1, 2).reshape(bottom - top, right - left)
    return matrix


def inverse_root(factors: Tensor, power: int, damping: float) -> Tensor:
    """`(F + damping * largest eigenvalue * I)^(-1/power)` of every symmetric `F` of `factors` `(b, n, n)`.

    In float64, because a float32 decomposition loses the small eigenvalues from condition 1e6 on. The root of a zero
    matrix is the identity, and that of one which is not finite is not a number.
    """
    exact = factors.double()
    finite = exact.isfinite().flatten(1).all(1)[:, None, None]
    identity = torch.eye(exact.shape[-1], dtype=exact.dtype, device=exact.device)
    values, vectors = torch.linalg.eigh(torch.where(finite, exact, identity))
    largest = values[:, -1:]
    damped = torch.where(largest > 0, values.clamp(min=0) + damping * largest, 1)
    roots = (vectors * damped.pow(-1 / power)[:, None]) @ vectors.mT
    return torch.where(finite, roots, math.nan).to(factors.dtype)


def _spans(length: int, size: int) -> list[tuple[int, int, int]]:
    """Start, end and piece length of the part of a side that is cut into pieces of `size`, and of the remainder."""
    end = length - length % size  # of the blocks of full size
    spans = [(0, end, size), (end, length, length - end)]
    return [span for span in spans if span[0] < span[1]]
