"""Gram matrices and means of a layer's inputs, summed over any number of batches of calibration images."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.arguments import check_fields
from compress.models.canonical import Layer
from compress.quantization.patches import live_columns, patches, row_count, spread, with_rows

# Elements of one chunk of patches; bounds the memory beside the Grams themselves (16 MiB a copy in float32).
CHUNK = 1 << 22
# Symmetric products are made in this many stripes: the lower triangle then costs 56 % of the full matrix.
STRIPES = 8
# Below so many images the ridge grows as their number falls.
FEW = 64
# Ridges that are added where a layer has as many columns as patches.
SCARCE = 100


@dataclass(frozen=True)
class GramOptions:
    """How Grams are computed: from at most `max_rows` patches of a layer, evenly spread (None: all), in `dtype`.

    ridge: the share of the mean diagonal element that is added to the diagonals of both Grams. To the error of the
    outputs, |X w - X~ q|^2, that adds the share times |w - q|^2, so that a weight whose input hardly varies on the
    calibration images is rounded, and few images cannot say more than they know. Below 64 images it grows as their
    number falls, and it grows by 100 times itself for every column to a patch: a least-squares fit of d columns to n
    samples is off by d/n of the noise on other samples, and the last layer, with fewer images than columns, would
    undo the errors of the layers before on the calibration images and add to them on all others.
    """

    max_rows: Annotated[int, Field(ge=1)] | None = None
    dtype: Literal["float32", "float64"] = "float32"
    ridge: Annotated[float, Field(ge=0)] = 0.01

    def __post_init__(self) -> None:
        check_fields(self)

    def moments(self, layer: Layer, quantized: Sequence[Tensor], analog: Sequence[Tensor], centre: bool) -> "Moments":
        """The `Moments` of a convolution or linear layer, given its inputs in both networks, one tensor a batch."""
        if isinstance(layer, nn.Conv1d):
            layer, once = with_rows(layer), {id(batch): batch.unsqueeze(2) for batch in (*quantized, *analog)}
            quantized, analog = [once[id(batch)] for batch in quantized], [once[id(batch)] for batch in analog]
        every = 1
        if self.max_rows is not None:
            rows = sum(row_count(layer, batch) for batch in quantized)
            every = spread(-(-rows // self.max_rows), row_count(layer, quantized[0][:1]))
        moments = Moments(layer, getattr(torch, self.dtype), centre, every, self.ridge)
        for mine, other in zip(quantized, analog, strict=True):
            moments.update(mine, other)
        return moments


class Moments:
    """Sums over the patches of one layer, in `dtype`: Grams of the quantized inputs X~ with X~ and with X, and means.

    With `centre` the Grams are those of X~ - mu~ and X - mu. While no layer before has been quantized, `update` is
    given the same tensor twice and does the work once. Of the patches, only one in `every` counts. `live` holds the
    columns (of all d) the sums are about, or None for all; see `live_columns`.
    """

    # Made by the first batch; the last three only where the inputs differ or the Grams are centred.
    gram: Tensor
    sum_quantized: Tensor
    cross: Tensor
    sum_analog: Tensor
    shift_quantized: Tensor
    shift_analog: Tensor

    def __init__(
        self, layer: nn.Conv2d | nn.Linear, dtype: torch.dtype, centre: bool, every: int = 1, ridge: float = 0.0
    ) -> None:
        self.layer, self.dtype, self.centre, self.every, self.ridge = layer, dtype, centre, every, ridge
        self.count = self.seen = self.images = 0
        self.live: Tensor | None = None
        self.same = True

    def update(self, quantized: Tensor, analog: Tensor) -> None:
        """Add one batch of the layer's inputs, quantized X~ and analog X: (B, C, H, W), or (..., d) for a Linear."""
        if quantized.numel() == 0:
            return
        per_item = max(1, self._patch_elements(quantized) // quantized.shape[0])
        # Chunks of one size: a small rest would read and write the whole Grams for few patches.
        count = min(quantized.shape[0], -(-quantized.shape[0] * per_item // CHUNK))
        parts = quantized.tensor_split(count)
        for mine, other in zip(parts, parts if analog is quantized else analog.tensor_split(count), strict=True):
            self._add(mine, other)

    def _patch_elements(self, inputs: Tensor) -> int:
        if isinstance(self.layer, nn.Linear):
            return inputs.numel()
        kernel = self.layer.kernel_size[0] * self.layer.kernel_size[1]
        return inputs.numel() * kernel // (self.layer.stride[0] * self.layer.stride[1]) + 1

    def _add(self, quantized: Tensor, analog: Tensor) -> None:
        same = analog is quantized
        if self.count == 0:
            self.live = live_columns(self.layer, quantized)
        mine = self._columns(quantized)
        other = mine if same else self._columns(analog)
        self.seen += row_count(self.layer, quantized)
        self.images += quantized.shape[0]
        if mine.shape[2] == 0:
            return
        first = self.count == 0
        if first:
            groups, depth, _ = mine.shape
            self.gram = mine.new_empty(groups, depth, depth)
            self.sum_quantized = mine.new_zeros(groups, depth)
            # Sums about a first guess of the mean: n mu mu^T, subtracted at the end, would cancel their digits.
            if self.centre:
                self.shift_quantized, self.shift_analog = mine.mean(2, keepdim=True), other.mean(2, keepdim=True)
            if not same:
                self.cross, self.sum_analog = torch.empty_like(self.gram), torch.zeros_like(self.sum_quantized)
                self.same = False
        self.count += mine.shape[2]
        if self.centre:
            mine = mine - self.shift_quantized
        add_lower(self.gram, mine, mine, first)
        self.sum_quantized += mine.sum(2)
        if not same:
            if self.centre:
                other = other - self.shift_analog
            self.cross.baddbmm_(mine, other.transpose(1, 2), beta=0 if first else 1)
            self.sum_analog += other.sum(2)

    def _columns(self, inputs: Tensor) -> Tensor:
        columns = patches(self.layer, inputs.to(self.dtype))
        if self.every > 1:
            # As if all batches were one, so that the choice does not depend on how they are cut.
            columns = columns[:, :, -self.seen % self.every :: self.every]
        return columns if self.live is None else columns[:, self.live]

    @property
    def grown_ridge(self) -> float:
        """The share of the mean diagonal element that is added to the diagonals, see `GramOptions`."""
        return self.ridge * (max(1.0, FEW / self.images) + SCARCE * self.gram.shape[1] / self.count)

    @cached_property
    def finished(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(gram, cross, mean_quantized, mean_analog): (groups, d, d) twice and (groups, d) twice; nothing can follow.

        d is the number of columns in `live`, all of them where that is None. With `centre`, a quantized input that
        varies by less than the rounding of its mean counts as dead: its row in both, and its column in gram, are zero
        but for the ridge.
        """
        gram = mirror_lower(self.gram)
        cross = gram if self.same else self.cross
        mean_quantized = self.sum_quantized / self.count
        mean_analog = mean_quantized if self.same else self.sum_analog / self.count
        if self.centre:
            gram.baddbmm_(mean_quantized[:, :, None], mean_quantized[:, None, :], alpha=-self.count)
            if cross is not gram:
                cross.baddbmm_(mean_quantized[:, :, None], mean_analog[:, None, :], alpha=-self.count)
            mean_quantized = mean_quantized + self.shift_quantized[:, :, 0]
            mean_analog = mean_quantized if cross is gram else mean_analog + self.shift_analog[:, :, 0]
            rounding = 64 * torch.finfo(self.dtype).eps * mean_quantized
            constant = gram.diagonal(dim1=1, dim2=2) <= self.count * rounding.square()
            if bool(constant.any()):
                gram[constant] = 0
                cross[constant] = 0
                gram.transpose(1, 2)[constant] = 0
        if self.ridge:
            diagonal = gram.diagonal(dim1=1, dim2=2)
            mean = diagonal.mean(1, keepdim=True)
            # Where no input varies, any weight of the second term will do.
            share = torch.where(mean > 0, self.grown_ridge * mean, 1.0)
            diagonal.add_(share)
            if cross is not gram:
                cross.diagonal(dim1=1, dim2=2).add_(share)
        return gram, cross, mean_quantized, mean_analog


def add_lower(gram: Tensor, left: Tensor, right: Tensor, first: bool = False) -> None:
    """gram += left @ right^T, at least its lower triangle: (g, d, d), and (g, d, n) twice; `first`: it was empty."""
    depth, beta = gram.shape[1], 0 if first else 1
    if depth < 512:
        gram.baddbmm_(left, right.transpose(1, 2), beta=beta)
        return
    for stripe in torch.arange(depth).tensor_split(STRIPES):
        start, stop = int(stripe[0]), int(stripe[-1]) + 1
        gram[:, start:stop, :stop].baddbmm_(left[:, start:stop], right[:, :stop].transpose(1, 2), beta=beta)


def mirror_lower(gram: Tensor) -> Tensor:
    """The lower triangle copied onto the upper one, in place."""
    depth = gram.shape[1]
    if depth >= 512:
        bounds = [(int(stripe[0]), int(stripe[-1]) + 1) for stripe in torch.arange(depth).tensor_split(STRIPES)]
        for start, stop in bounds[1:]:
            gram[:, :start, start:stop] = gram[:, start:stop, :start].transpose(1, 2)
    return gram
