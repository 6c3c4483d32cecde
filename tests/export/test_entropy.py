"""Entropy-coded numbers: they come back, in the bits that are foretold, by arithmetic that any machine does alike."""

from itertools import pairwise

import numpy as np
import pytest

from compress.export.entropy import MARK, MOST_PER_BYTE, Stack, _frequencies, _table, pushed_bits

UNIT = 2**24


def drawn(kind, size, count, seed=0):
    draw = np.random.default_rng(seed)
    if kind == "uniform":
        return draw.integers(0, count, size)
    if kind == "one":
        return np.full(size, count // 2)
    spread = {"normal": draw.normal(0, count / 8, size), "laplace": draw.laplace(0, 0.4, size)}[kind]
    return np.clip(np.rint(spread) + count // 2, 0, count - 1).astype(np.int64)


@pytest.mark.parametrize("kind", ["uniform", "one", "normal", "laplace"])
@pytest.mark.parametrize("count", [1, 2, 3, 17, 61, 256, 700, 2**16 + 1])
@pytest.mark.parametrize("size", [0, 1, 5, 4000, 70_000])
def test_numbers_come_back_in_the_bits_that_are_foretold(kind, count, size):
    numbers = drawn(kind, size, count)
    stack = Stack()
    stack.push(numbers, count)
    words = stack.words()
    read = Stack(words)
    found = read.pop(size, count)
    read.check_empty()
    assert found.dtype == np.int32
    assert np.array_equal(found, numbers)
    foretold = pushed_bits(np.bincount(numbers, minlength=count)) if size else 0
    assert size == 0 or abs(32 * words.size - 32 - foretold) <= 40


@pytest.mark.parametrize("kind", ["normal", "laplace"])
@pytest.mark.parametrize(("size", "share"), [(4000, 0.02), (200_000, 0.001)])
def test_numbers_take_little_more_than_their_entropy(kind, size, share):
    histogram = np.bincount(drawn(kind, size, 17), minlength=17)
    occurring = histogram[histogram > 0]
    entropy = -(occurring * np.log2(occurring / size)).sum()
    assert entropy < pushed_bits(histogram) < (1 + share) * entropy + 8 * 17


def test_what_was_pushed_last_is_popped_first():
    stack = Stack()
    stack.push(np.arange(5), 9)
    stack.push(np.array([3, 3, 1]), 4)
    read = Stack(stack.words())
    assert read.pop(3, 4).tolist() == [3, 3, 1]
    assert read.pop(5, 9).tolist() == [0, 1, 2, 3, 4]
    read.check_empty()


class IntegerStack:
    """The same coder in Python's integers alone: a state of 64 bits, words of 32, probabilities of 24."""

    def __init__(self, words):
        self.words = [int(word) for word in words]
        self.state = 0
        for _ in range(2):
            self._refill()

    def _refill(self):
        if self.words and self.state < 2**32:
            self.state = self.state << 32 | self.words.pop()

    def pop(self, probabilities):
        edges = [0]
        for probability in probabilities:
            edges.append(edges[-1] + probability)
        assert edges[-1] == UNIT
        place = self.state % UNIT
        [found] = [index for index, (low, high) in enumerate(pairwise(edges)) if low <= place < high]
        self.state = (self.state >> 24) * probabilities[found] + place - edges[found]
        self._refill()
        return found


def probabilities_of(frequencies):
    """In 2^-24: one each, the rest by frequency, no more than 1 - 2^-7, what is left for none of them."""
    free = UNIT - len(frequencies) - 1
    shares = [min(frequency * free // sum(frequencies), free - 2**17) for frequency in frequencies]
    return [share + 1 for share in shares] + [free - sum(shares) + 1]


@pytest.mark.parametrize(("kind", "size", "count"), [("normal", 300, 17), ("laplace", 500, 5), ("one", 100, 3)])
def test_python_integers_decode_a_stream(kind, size, count):
    numbers = drawn(kind, size, count)
    stack = Stack()
    stack.push(numbers, count)
    read = IntegerStack(stack.words())
    law = probabilities_of([UNIT // (9 + min(step, 256 - step) ** 2) for step in range(256)])
    table, t = [], 0
    for _ in range(count):
        t = (t + read.pop(law)) % 256
        table.append(t)
    present = [number for number in range(count) if table[number]]
    assert present == sorted(set(numbers.tolist()))
    frequencies = [(4 + (table[number] - 1) % 4) << (table[number] - 1) // 4 for number in present]
    probabilities = probabilities_of(frequencies)
    assert [present[read.pop(probabilities)] for _ in range(size)] == numbers.tolist()
    assert (read.state, read.words) == (MARK, [])


def test_a_table_has_each_frequency_to_an_eighth():
    for size, steps in ((5000, 4), (100_000, 8)):
        histogram = np.array([0, 1, 2, 3, 7, 9, 100, 1023, 1024])
        histogram[0] = size - histogram.sum()
        ratios = _frequencies(_table(histogram), size) / (steps * histogram)
        assert np.abs(ratios - 1).max() <= 1 / (2 * steps)
        assert np.all(ratios[histogram <= steps] == 1)


def test_numbers_that_are_all_one_take_a_share_of_a_byte_all_the_same():
    stack = Stack()
    stack.push(np.zeros(10**6, np.int64), 2)
    size = 4 * stack.words().size
    assert MOST_PER_BYTE * size >= 10**6
    assert size < 1.02 * 10**6 / MOST_PER_BYTE


def popped(words, sizes):
    """All numbers of a stack of `words`; `sizes` has (how many, of how many) of each that was pushed."""
    read = Stack(words)
    found = [read.pop(size, count) for size, count in sizes]
    read.check_empty()
    return found


@pytest.mark.parametrize("change", ["first", "last", "shorter", "longer", "flipped", "fewer", "more"])
def test_words_that_were_not_written_so_are_refused(change):
    numbers = drawn("normal", 2000, 17)
    stack = Stack()
    stack.push(numbers, 17)
    words, size = stack.words().copy(), 2000
    if change == "flipped":
        words[words.size // 2] ^= 1 << 7
    size += {"fewer": -1, "more": 1}.get(change, 0)
    kept = {"first": words[1:], "last": words[:-1], "shorter": words[:100]}.get(change, words)
    kept = np.concatenate([np.ones(1, np.uint32), kept]) if change == "longer" else kept
    with pytest.raises(ValueError, match=r"."):
        popped(kept, [(size, 17)])


@pytest.mark.parametrize("seed", range(30))
def test_noise_is_popped_without_harm_and_found_out(seed):
    words = np.random.default_rng(seed).integers(1, 2**32, 50).astype(np.uint32)
    with pytest.raises(ValueError, match=r"."):
        popped(words, [(100, 5), (1000, 256), (3, 2**16)])
