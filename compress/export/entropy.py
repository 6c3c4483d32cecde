"""Whole numbers in as few bits as their frequencies allow: a coder that is a stack, with a table before what it codes.

Asymmetric numeral systems, Duda 2013 (1311.2540), as `constriction` has them: probabilities of 24 bits, words of 32.
Every probability is a whole number of 2^-24 that follows from the table by integer arithmetic alone, so that every
machine reads what any other wrote. constriction gives each of n symbols 2^-24 and shares out the rest in proportion to
the numbers that it gets; here these are integers whose sum is that rest, so its float64 arithmetic is exact.

More numbers than a table has entries have one. It has a byte t for each of 0..count-1: 0 where that does not occur,
otherwise its frequency (S + m) << e with t - 1 = S e + m and S steps to an octave. What is coded of t is its difference
from the one before, modulo 256, by the fixed `LAW`.
"""

from functools import cache
from typing import Any

import numpy as np

UNIT = 1 << 24
# The likeliest number has at most the probability 1 - 2^-7. So it takes a hundredth of a bit at least, and no more than
# MOST_PER_BYTE numbers fit into a byte of a file, whatever it claims.
RESERVED = UNIT >> 7
MOST_PER_BYTE = 708
# What lies under all that is coded. It is found there again unless the words are not those that were written.
MARK = 0x5AFE_C0DE
# From so many numbers on, a table that is finer costs less than it saves.
MANY = 1 << 16
LAW = np.array([UNIT // (9 + min(difference, 256 - difference) ** 2) for difference in range(256)])


class Stack:
    """Whole numbers, of which those that were pushed last are popped first."""

    def __init__(self, words: np.ndarray | None = None) -> None:
        """An empty stack, or that of the little-endian `words`, uint32 (n,); raises ValueError where these are none."""
        import constriction  # late, so that what codes nothing needs no time for it

        self._coder = constriction.stream.stack.AnsCoder(np.array([MARK] if words is None else words, np.uint32))

    def words(self) -> np.ndarray:
        """All that was pushed, as uint32 (n,), little-endian."""
        return np.asarray(self._coder.get_compressed()).astype("<u4")

    def push(self, numbers: np.ndarray, count: int) -> None:
        """Integers `numbers` (n,), each of 0..count-1, and over them their table, where they have one."""
        if not _is_tabled(numbers.size, count):
            self._coder.encode_reverse(numbers.astype(np.int32), _model(_shares(np.ones(count, np.int64))))
            return
        table = _table(np.bincount(numbers, minlength=count))
        present = np.flatnonzero(table)
        place = np.zeros(count, np.int32)
        place[present] = np.arange(present.size)
        model = _model(_shares(_frequencies(table, numbers.size)[present]))
        self._coder.encode_reverse(place[numbers], model)
        self._coder.encode_reverse(_differences(table), _law())

    def pop(self, size: int, count: int) -> np.ndarray:
        """int32 (size,): the numbers, each of 0..count-1, that `push` pushed; ValueError where there are none."""
        if not _is_tabled(size, count):
            numbers: np.ndarray = self._coder.decode(_model(_shares(np.ones(count, np.int64))), size)
        else:
            differences = self._coder.decode(_law(), count)
            table = differences.cumsum() & 255
            present = np.flatnonzero(table).astype(np.int32)
            if int(differences.max()) > 255 or not present.size:
                raise ValueError("a table of frequencies that is none")
            places = self._coder.decode(_model(_shares(_frequencies(table, size)[present])), size)
            numbers = np.append(present, np.int32(count))[places]
        if int(numbers.max(initial=0)) >= count:
            raise ValueError("codes that their table does not have")
        return numbers.astype(np.int32, copy=False)

    def check_empty(self) -> None:
        """Raises ValueError where anything is left, or less was there than was popped."""
        if not np.array_equal(self._coder.get_compressed(), [MARK]):
            raise ValueError("a stream that does not end with its last code")


def pushed_bits(histogram: np.ndarray) -> float:
    """Bits by which a stack grows when numbers are pushed of which each k occurs histogram[k] times."""
    size = int(histogram.sum())
    if not _is_tabled(size, histogram.size):
        return float(size * (24 - np.log2(_shares(np.ones(histogram.size, np.int64))[0] + 1)))
    table = _table(histogram)
    occurring = histogram[histogram > 0]
    shares = _shares(_frequencies(table, size)[histogram > 0])
    codes = float(occurring @ (24 - np.log2(shares[:-1] + 1)))
    return codes + float((24 - np.log2(_shares(LAW) + 1))[_differences(table)].sum())


def _is_tabled(size: int, count: int) -> bool:
    """Whether `size` numbers of 0..count-1 have a table; without one, all are as likely."""
    return size > count


def _steps(size: int) -> int:
    """S, steps to an octave of a table for `size` numbers."""
    return 8 if size >= MANY else 4


def _table(histogram: np.ndarray) -> np.ndarray:
    """int64 (count,), each 0..255: the table of how often each number occurs."""
    steps = _steps(int(histogram.sum()))
    exponents = np.frexp(histogram.astype(np.float64))[1].astype(np.int64) - 1
    exponents[histogram == 0] = 0
    # steps * histogram >> exponents, rounded; where that gives 2 * steps, t is that of the next octave's first.
    mantissas = (2 * steps * histogram.astype(np.int64) + (1 << exponents)) >> (exponents + 1)
    return np.where(histogram > 0, 1 + steps * exponents + mantissas - steps, 0)


def _frequencies(table: np.ndarray, size: int) -> np.ndarray:
    """int64, below 2^37, so that 2^24 times as much fits: what the bytes of a table for `size` numbers stand for."""
    steps = _steps(size)
    exponents, mantissas = np.divmod(np.maximum(table.astype(np.int64) - 1, 0), steps)
    return (steps + mantissas) << np.minimum(exponents, 33)


def _shares(frequencies: np.ndarray) -> np.ndarray:
    """int64 (n + 1,): the probability of each of n symbols, and at last of none of them, in units of 2^-24, less 1."""
    free = UNIT - frequencies.size - 1
    shares = np.minimum(frequencies * free // frequencies.sum(), free - RESERVED)
    return np.append(shares, free - shares.sum())


def _differences(table: np.ndarray) -> np.ndarray:
    return (np.diff(table, prepend=0) & 255).astype(np.int32)


def _model(shares: np.ndarray) -> Any:
    import constriction

    return constriction.stream.model.Categorical(shares.astype(np.float64), perfect=False)


@cache
def _law() -> Any:
    return _model(_shares(LAW))
