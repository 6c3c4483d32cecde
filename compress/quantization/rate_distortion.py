"""Codes of least `error + price * bits`: one step for all weights of a layer, and as many codes as they need.

Where an entropy coder follows, a code of frequency p takes -log2 p bits, so the widths of codes do not matter, and the
best grid is uniform and has one step for the whole layer (Gish & Pierce 1968, for high rates). At such rates the error
per weight is step^2 / 12 of its input's energy and falls by a factor 4 for a bit more, which gives the step of a price.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from compress.quantization.coupled_rows import CoupledRows, Own, Rows
from compress.quantization.lookahead import Lookahead, both_ways
from compress.quantization.problem import Decide, DecideBlock, product, rows_last
from compress.quantization.refinement import sweep_once
from compress.quantization.survivors import NEVER, Choose

# Codes lie in -LARGEST..LARGEST, so that a 16-bit grid holds them.
LARGEST = 2**15 - 1
# Codes beyond those in use that a pass over the weights may take, and how often a code counts as seen that is not.
MARGIN, UNSEEN = 2, 0.5
# Borders of codes that are held at a time, unless one column has more.
TOGETHER = 1 << 20
# How much longer steps are than those at which a bit would be worth its price if errors were independent and even.
# Chosen by the error and the bits of the layers of a ResNet-20 together: 1.2 and 2 are worse.
LONGER = 1.7
# The share of a step by which rounding is drawn to zero before the lengths of the codes are known.
DEAD_ZONE = 0.1
# How often the lengths of codes are counted where every value is decided by itself.
COUNTED = 2


class Part(NamedTuple):
    """The rows of a layer with one pair of Grams, or with one each, see `compress.quantization.problem.Problem`.

    mask (N, d): False where a weight is pruned; None where none is. coupling (N, N): what products of the errors of two
    rows count, see `compress.quantization.coupled_rows`, of rows with Grams of their own only its diagonal; None: rows
    are independent, and each counts the same.
    """

    weight: Tensor
    gram: Tensor
    cross: Tensor
    mask: Tensor | None = None
    coupling: Tensor | None = None


@dataclass(frozen=True)
class CodeLengths:
    """Bits of the codes `first`, `first` + 1, ... by their frequencies: `bits` (K,)."""

    first: int
    bits: Tensor

    @classmethod
    def of(cls, codes: Sequence[Tensor]) -> "CodeLengths":
        """By how often each whole number occurs in `codes`, floats of any shape; MARGIN more on either side."""
        first, counts = _histogram(codes, MARGIN)
        seen = counts + UNSEEN
        return cls(first, (seen / seen.sum()).log2().neg().to(codes[0].dtype))

    @cached_property
    def _midpoints(self) -> Tensor:
        return torch.arange(1, len(self.bits)).to(self.bits) + (self.first - 0.5)

    @cached_property
    def _half_differences(self) -> Tensor:
        return self.bits.diff() / 2

    def decide_block(self, price: Tensor) -> Decide:
        """What turns values v (M,) of a column, in place, to the codes z of least (z - v)^2 + price * bits.

        price: (b, 1), or (b, M) where each value has its own. Neighbours are separated at their midpoint, moved towards
        the rarer one by half of the price of the difference of their lengths. Where that would make a code's interval
        empty, it is not used.
        """
        together = price.numel() * len(self.bits) <= TOGETHER
        borders = self._borders(price).unbind(0) if together else None

        def decide(column: int, values: Tensor) -> None:
            own = self._borders(price[column]) if borders is None else borders[column]
            values.copy_(self._between(own, values))

        return decide

    def choose_block(self, price: Tensor) -> Choose:
        """What finds for values (B, M) of a column the best code, as `decide_block` does, and the better neighbour."""
        margin = self.bits.new_full((1,), NEVER)
        bits = torch.cat([margin, self.bits, margin])
        borders = self._borders(price)

        def choose(column: int, values: Tensor) -> tuple[Tensor, Tensor]:
            # Rows of borders are of rows of a layer, or one for all.
            turned = values.T if len(borders[column]) > 1 else values
            first = self._between(borders[column], turned.contiguous()).view_as(turned)
            first = first.T if len(borders[column]) > 1 else first
            around = torch.stack([first, first - 1, first + 1])
            penalties = price[column] * bits[(around - (self.first - 1)).long()]
            below, above = (around[1:] - values).square() + penalties[1:]
            second = torch.where(below <= above, -1.0, 1.0)
            other = torch.where(below <= above, penalties[1], penalties[2])
            return torch.stack([first, first + second]), torch.stack([penalties[0], other])

        return choose

    def _borders(self, price: Tensor) -> Tensor:
        """Of the codes' intervals, at each price: (..., K - 1)."""
        return torch.cummax(self._midpoints + price[..., None] * self._half_differences, -1).values

    def _between(self, borders: Tensor, values: Tensor) -> Tensor:
        # searchsorted wants as many rows of borders as of values, or a single row of either.
        index = torch.searchsorted(borders, values.view(len(borders), -1), right=True)
        return index.flatten().to(values.dtype).add_(self.first)


def step_of(price: float, energy: float) -> float:
    """LONGER times the step at which a bit more is worth its `price`, for inputs of that mean `energy`, mean diag(G).

    With D = energy * step^2 / 12 and dD/dR = -2 ln 2 D.
    """
    return LONGER * math.sqrt(6 * price / (math.log(2) * energy))


def entropy(codes: Sequence[Tensor]) -> float:
    """The bits that all `codes`, floats of whole numbers, take at their own frequencies."""
    _, counts = _histogram(codes)
    counts = counts[counts > 0].double()
    return 0.0 - float((counts * (counts / counts.sum()).log2()).sum())  # not -0.0 for a single code


def entropy_alone(values: Tensor) -> float:
    """The bits of the codes of `values` (M,), in steps, each of least error + price * bits by itself.

    The price is that for which `step_of` gives the step.
    """
    price = values.new_full((1, 1), math.log(2) / (6 * LONGER**2))
    codes = values.round()
    for _ in range(COUNTED):
        decide = CodeLengths.of([codes]).decide_block(price)
        codes = values.clone()
        decide(0, codes)
    return entropy([codes])


def _largest(parts: Sequence[Tensor]) -> float:
    return max(float(part.abs().max()) for part in parts)


def _histogram(codes: Sequence[Tensor], margin: int = 0) -> tuple[int, Tensor]:
    """(the lowest code, how often it and each of the next occur), with `margin` more on either side up to LARGEST."""
    lowest, highest = min(int(part.min()) for part in codes), max(int(part.max()) for part in codes)
    if margin:
        lowest, highest = max(lowest - margin, -LARGEST), min(highest + margin, LARGEST)
    size = highest - lowest + 1
    return lowest, torch.stack(
        [torch.bincount((part - lowest).long().flatten(), minlength=size) for part in codes]
    ).sum(0)


@torch.no_grad()
def solve_for_price(
    parts: Sequence[Part],
    price: float,
    sweeps: int,
    block_size: int = 128,
    survivors: int = 1,
    revise: Callable[[Sequence[Tensor]], float] | None = None,
) -> tuple[list[Tensor], float]:
    """(codes (N, d) of each part, step): floats of whole numbers; a weight is `step` times its code.

    price: the output error, in the unit of the Grams, that a bit is worth. A first pass over the columns and as many
    more as there are `sweeps` minimise one objective: those with a lookahead, in turn from the columns of least energy
    to those of most and back, the last of them back, and the last of all by coordinate descent. After each the step is
    fitted to the codes as `refit_scales` does, and the lengths of the codes are counted anew. survivors: how many
    answers to a row are in the race in passes with a lookahead, see `compress.quantization.survivors`. revise: called
    with the codes after half of the passes with a lookahead, and after each further one but the last; the price from
    there on.
    """
    layer = [_Rows(part, block_size) for part in parts]
    count = sum(part.weight.numel() for part in parts)
    energy = sum(rows.energy for rows in layer) / count
    largest = _largest([part.weight for part in parts])
    spread = sum(float(part.weight.square().sum()) for part in parts) / count
    step = step_of(price, energy) if energy > 0 else 1.0
    shortest = max(largest / LARGEST, torch.finfo(torch.float32).tiny)
    step = max(step, shortest)
    for rows in layer:
        rows.start(step, step**2 / 12 / spread if spread else 1.0)
    lengths = CodeLengths.of([rows.rounded(step) for rows in layer])
    for left in reversed(range(max(sweeps, 1))):
        for rows in layer:
            rows.look_ahead(left, step, price, lengths, survivors)
        step = _fitted(layer, step)
        lengths = CodeLengths.of([rows.codes for rows in layer])
        if revise and 0 < left <= sweeps // 2:
            before, price = price, revise([rows.codes for rows in layer])
            if price != before:
                step = max(step * math.sqrt(price / before), shortest)
                # A shorter step takes larger codes, which have no lengths yet.
                rounded = [rows.rounded(step) for rows in layer]
                if _largest(rounded) > _largest([rows.codes for rows in layer]) + MARGIN:
                    lengths = CodeLengths.of(rounded)
    if sweeps:
        for rows in layer:
            rows.sweep(step, price, lengths)
        step = _fitted(layer, step)
    return [rows.codes.T.contiguous() for rows in layer], step


class _Rows:
    """The codes (d, N) of one part, before the first pass any real numbers, and what its passes share."""

    codes: Tensor
    moments: Tensor
    lookaheads: tuple[Lookahead, Lookahead]
    coupled: CoupledRows | None = None

    def __init__(self, part: Part, block_size: int) -> None:
        self.part, self.block_size = part, block_size
        self.weight = part.weight.to(part.gram.dtype)
        self.target = product(part.cross, self.weight.T)
        self.energy = float(rows_last(part.gram).diagonal().expand(len(self.weight), -1).sum())
        self.keep = None if part.mask is None else part.mask.T.to(self.weight.dtype)
        self.coupling = None if part.coupling is None else part.coupling.to(part.gram.dtype)
        # What the square of an output error counts, of a row that is decided by itself.
        self.alone: Own = 1.0
        if self.coupling is not None and part.gram.dim() == 3:
            self.alone = self.coupling.diagonal()

    def rounded(self, step: float) -> Tensor:
        size = self.weight.abs() / step
        return (size - DEAD_ZONE).clamp_min_(0).round_().clamp_max_(LARGEST).mul_(self.weight.sign())

    def start(self, step: float, rounding: float) -> None:
        """From the weights as they are; `rounding` as for `both_ways`."""
        self.codes = self.weight.T / step
        self.moments = product(self.part.gram, self.codes)
        self.lookaheads = both_ways(self.part.gram, rounding)
        if self.coupling is not None and self.part.gram.dim() == 2:
            self.coupled = CoupledRows(self.coupling, rounding)

    def look_ahead(self, left: int, step: float, price: float, lengths: CodeLengths, survivors: int) -> None:
        """One pass with a lookahead, after which as many are `left`."""
        way = left % 2

        def decide(rows: Rows, gradient: Tensor, own: Own) -> Tensor:
            lookahead, reference = self.lookaheads[way], self.codes[:, rows]
            keep = None if self.keep is None else self.keep[:, rows]
            prices = price / step**2 / own
            if survivors > 1:

                def choose_block(inverse: Tensor, some: slice) -> Choose:
                    return lengths.choose_block((prices[some] if isinstance(prices, Tensor) else prices) * inverse)

                return lookahead.with_survivors(reference, gradient, keep, survivors, choose_block)
            return lookahead(reference, gradient, keep, self.block_size, _decide_block(prices, lengths))

        gradient = self.target / step - self.moments
        if self.coupled:
            self.coupled.look_ahead(way, not left, self.codes, self.moments, gradient, self.part.gram, decide)
        else:
            self.codes = decide(slice(None), gradient, self.alone)
            self.moments = product(self.part.gram, self.codes)

    def sweep(self, step: float, price: float, lengths: CodeLengths) -> None:
        part, target = self.part, self.target / step

        def decide(rows: Rows, gradient: Tensor, own: Own) -> Tensor:
            codes, moments = self.codes[:, rows].contiguous(), self.moments[:, rows].contiguous()
            mask = None if part.mask is None else part.mask[rows]
            decide_block = _decide_block(price / step**2 / own, lengths)
            sweep_once(moments + gradient, part.gram, mask, codes, moments, self.block_size, decide_block)
            return codes

        if self.coupled:
            self.coupled.sweep(self.codes, self.moments, target, part.gram, decide)
        else:
            decide_block = _decide_block(price / step**2 / self.alone, lengths)
            sweep_once(target, part.gram, part.mask, self.codes, self.moments, self.block_size, decide_block)

    def fit(self) -> tuple[float, float]:
        """Overlap with the analog weights and energy of the codes, whose ratio is the step of least error."""
        weighed = self.codes @ self.coupled.coupling if self.coupled else self.codes * self.alone
        return float((self.target * weighed).sum()), float((self.moments * weighed).sum())


def _decide_block(prices: Own, lengths: CodeLengths) -> DecideBlock:
    return lambda inverse: lengths.decide_block(prices * inverse)


def _fitted(layer: Sequence[_Rows], step: float) -> float:
    overlap, energy = (sum(values) for values in zip(*[rows.fit() for rows in layer], strict=True))
    fitted = overlap / energy if energy > 0 else 0.0
    return fitted if 0 < fitted < math.inf else step
