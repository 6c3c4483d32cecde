"""Random choices as pure functions of a key, the same on every platform and in every version of NumPy.

Only the raw output of a bit generator is used: NumPy promises that this stream never changes (NEP 19), which it does
not for `permutation` or `integers`, nor PyTorch for `randperm`.
"""

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """What a draw is for; no two purposes share their random numbers."""

    SPLIT_ORDER = 0
    SPLIT_TIES = 1
    ORDER = 2
    TOP = 3
    LEFT = 4
    MIRROR = 5
    CUTOUT_ROW = 6
    CUTOUT_COLUMN = 7
    OPERATION = 8
    SIGN = 9
    CROP_AREA = 10
    CROP_RATIO = 11
    CROP_TOP = 12
    CROP_LEFT = 13
    JITTER = 14
    JITTER_ORDER = 15


def draw(count: int, stream: Stream, seed: int, epoch: int = 0) -> np.ndarray:
    """Independent uniform 64-bit numbers, uint64 `(count,)`; element i depends on the arguments and i alone."""
    return np.random.PCG64((seed, epoch, int(stream))).random_raw(count)


def draw_integers(count: int, below: int, stream: Stream, seed: int, epoch: int = 0) -> Tensor:
    """Uniform integers in 0..below-1, int64 `(count,)`; the bias of the remainder is under `below` / 2^64."""
    return torch.from_numpy((draw(count, stream, seed, epoch) % np.uint64(below)).astype(np.int64))


def draw_uniform(count: int, stream: Stream, seed: int, epoch: int = 0) -> Tensor:
    """Uniform numbers in 0..1 without 1, float64 `(count,)`."""
    return torch.from_numpy((draw(count, stream, seed, epoch) >> np.uint64(11)) * 2.0**-53)


def permutation(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: the integers 0..count-1 shuffled."""
    order: list[int] = np.argsort(draw(count, Stream.ORDER, seed, epoch), kind="stable").tolist()
    return order


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A shuffled order of all images of which every prefix holds the classes in proportion.

    `labels` is int64 `(n,)`, the answer an int64 permutation `(n,)` on the CPU. In a prefix of k images, a class with
    n_c of the n images has n_c k / n, up to rounding, and exactly that where these are integers for all
    classes. So a split, a slice for a quick try and a calibration set are all prefixes of such an order.
    """
    classes = labels.cpu().numpy()
    total = len(classes)
    by_class = np.lexsort((draw(total, Stream.SPLIT_ORDER, seed), classes))
    counts = np.bincount(classes)
    rank = np.empty(total, dtype=np.int64)
    rank[by_class] = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    # The r-th of a class takes a random place in the r-th of n_c equal parts of the order.
    within = (draw(total, Stream.SPLIT_TIES, seed) >> np.uint64(11)) * 2.0**-53
    return torch.from_numpy(np.argsort((rank + within) / counts[classes], kind="stable"))
