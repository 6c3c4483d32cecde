"""Augmentation of batches of bytes: crops, mirror, colours, RandAugment, normalisation and cut-out.

Cut-out: DeVries & Taylor 2017, https://arxiv.org/abs/1708.04552. Images are `(B, C, H, W)` tensors whose channels lie
last in memory: a row of pixels is then one run of bytes, which makes a crop a copy of runs and normalisation one
multiply-add along them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from compress.data.colour_jitter import colour_jitter, draw_jitter
from compress.data.draws import Stream, draw_integers
from compress.data.normalisation import Normalisation
from compress.data.randaugment import OPERATIONS, rand_augment
from compress.data.resized_crop import draw_boxes, resized_crops
from compress.data.transfer import moved


@dataclass(frozen=True)
class Draws:
    """The random choices for n images, CPU tensors of n rows; None where the augmentation is off.

    `top`, `left`: corner of the crop in the padded image. `mirrored`: bool. `row`, `column`: centre of the cut-out.
    `operations` and `negative`, `(n, k)`: index into OPERATIONS, and whether its magnitude is negated.
    `boxes`, `(n, 4)`: see `draw_boxes`. `factors` and `order`, `(n, 4)`: see `draw_jitter`.
    """

    top: Tensor | None = None
    left: Tensor | None = None
    mirrored: Tensor | None = None
    row: Tensor | None = None
    column: Tensor | None = None
    operations: Tensor | None = None
    negative: Tensor | None = None
    boxes: Tensor | None = None
    factors: Tensor | None = None
    order: Tensor | None = None

    def __getitem__(self, index: Tensor) -> "Draws":
        tables = {field.name: getattr(self, field.name) for field in fields(self)}
        return Draws(**{name: table[index] for name, table in tables.items() if table is not None})


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image: lengths in pixels, 0, False or None for off.

    `random_resized_crop`: the least and the greatest share of the area. `colour_jitter`: see `draw_jitter`.
    """

    crop_padding: int = 0
    horizontal_flip: bool = False
    cutout: int = 0
    randaugment: int = 0
    randaugment_magnitude: int = 9
    random_resized_crop: Sequence[float] | None = None
    colour_jitter: Sequence[float] | None = None

    @property
    def is_random(self) -> bool:
        """Whether an image looks different from epoch to epoch."""
        options = (self.crop_padding, self.horizontal_flip, self.cutout, self.randaugment)
        return any(options) or self.random_resized_crop is not None or self.colour_jitter is not None

    def draw(self, count: int, image_size: int, seed: int, epoch: int, stored_size: int | None = None) -> Draws:
        """The choices for images 0..count-1 in one epoch, a pure function of the arguments.

        stored_size: the side of the images that are augmented, from which random resized crops are taken; None:
        `image_size`, the side of those that come out.
        """

        def integers(below: int, stream: Stream, columns: int = 1) -> Tensor:
            return draw_integers(count * columns, below, stream, seed, epoch)

        tables: dict[str, Tensor] = {}
        if self.crop_padding:
            offsets = 2 * self.crop_padding + 1
            tables |= {"top": integers(offsets, Stream.TOP), "left": integers(offsets, Stream.LEFT)}
        if self.horizontal_flip:
            tables["mirrored"] = integers(2, Stream.MIRROR).bool()
        if self.cutout:
            tables["row"] = integers(image_size, Stream.CUTOUT_ROW)
            tables["column"] = integers(image_size, Stream.CUTOUT_COLUMN)
        if self.randaugment:
            shape = (count, self.randaugment)
            tables["operations"] = integers(len(OPERATIONS), Stream.OPERATION, self.randaugment).view(shape)
            tables["negative"] = integers(2, Stream.SIGN, self.randaugment).view(shape).bool()
        if self.random_resized_crop:
            tables["boxes"] = draw_boxes(count, stored_size or image_size, self.random_resized_crop, seed, epoch)
        if self.colour_jitter:
            tables["factors"], tables["order"] = draw_jitter(count, self.colour_jitter, seed, epoch)
        return Draws(**tables)

    def __call__(self, images: Tensor, choices: Draws, normalisation: Normalisation) -> Tensor:
        """uint8 `(B, 3, S, S)` and the choices for these B images to float32 `(B, 3, H, W)`, channels last."""
        if choices.boxes is not None:
            images = resized_crops(images, choices.boxes, normalisation.width)
        if choices.top is not None or choices.mirrored is not None:
            images = crop_and_mirror(images, choices.top, choices.left, choices.mirrored, self.crop_padding)
        if self.colour_jitter and choices.factors is not None and choices.order is not None:
            images = colour_jitter(images, choices.factors, choices.order, self.colour_jitter)
        if choices.operations is not None and choices.negative is not None:
            images = rand_augment(images, choices.operations, choices.negative, self.randaugment_magnitude)
        result = normalisation(images)
        if choices.row is not None and choices.column is not None:
            cut_out_(result, choices.row, choices.column, self.cutout)
        return result


def crop_and_mirror(
    images: Tensor, top: Tensor | None, left: Tensor | None, mirrored: Tensor | None, padding: int
) -> Tensor:
    """Pads `(B, C, H, W)` with zeros, cuts image b out at row `top[b]`, column `left[b]`, and mirrors where asked.

    `top`, `left`: int64 `(B,)` in 0..2*padding, None for the middle; `mirrored`: bool `(B,)`, None for no image.
    On a CPU all crops are one gather of rows: a strided view of the padded batch has a row starting at every byte, and
    the rows that begin where the crops do are taken from it. Mirrored images are padded mirrored (their crop then
    begins at `2 * padding - left`) at the end of the padded batch; the gather restores the order. On a GPU it is one
    of pixels, see `gathered`.
    """
    if images.is_cuda:
        return gathered(images, top, left, mirrored, padding)
    batch, channels, height, width = images.shape
    pixels = images.permute(0, 2, 3, 1)
    padded = images.new_zeros((batch, height + 2 * padding, width + 2 * padding, channels))
    inner = padded[:, padding : padding + height, padding : padding + width]
    place = torch.arange(batch)
    top = torch.full((batch,), padding) if top is None else top
    left = torch.full((batch,), padding) if left is None else left
    if mirrored is None:
        inner.copy_(pixels)
    else:
        straight, turned = (~mirrored).nonzero()[:, 0], mirrored.nonzero()[:, 0]
        inner[: len(straight)] = pixels.index_select(0, moved(straight, images.device))
        inner[len(straight) :] = pixels.index_select(0, moved(turned, images.device)).flip(2)
        place = torch.empty(batch, dtype=torch.int64).index_copy_(0, torch.cat([straight, turned]), place)
        left = torch.where(mirrored, 2 * padding - left, left)

    run, stride = width * channels, padded.stride(1)
    first = moved(place * padded.stride(0) + top * stride + left * channels, images.device)
    starts = first[:, None] + torch.arange(0, height * stride, stride, device=images.device)
    every_row = padded.as_strided((padded.numel() - run + 1, run), (1, 1))
    cropped = every_row.index_select(0, starts.flatten())
    return cropped.view(batch, height, width, channels).permute(0, 3, 1, 2)


def gathered(images: Tensor, top: Tensor | None, left: Tensor | None, mirrored: Tensor | None, padding: int) -> Tensor:
    """`crop_and_mirror` in fewer and larger operations, which a GPU is faster at and a CPU is not."""
    batch, channels, height, width = images.shape
    middle = torch.full((batch,), padding)
    straight = torch.zeros(batch, dtype=torch.bool)
    chosen = [middle if top is None else top, middle if left is None else left]
    chosen.append(width * (straight if mirrored is None else mirrored).long())
    first_row, first_column, turned = moved(torch.stack(chosen), images.device)[:, :, None]
    rows = torch.arange(-padding, height - padding, device=images.device) + first_row
    columns = torch.arange(width, device=images.device)
    columns = (columns - turned).abs() - (turned > 0).long() - padding + first_column
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    place = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None]
    place = place + torch.arange(0, batch * height * width, height * width, device=images.device)[:, None, None]
    pixels = images.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, place.flatten())
    pixels *= inside.view(-1, 1)
    return pixels.view(batch, height, width, channels).permute(0, 3, 1, 2)


def cut_out_(images: Tensor, row: Tensor, column: Tensor, side: int) -> Tensor:
    """Zeroes, in place, a square of `side` pixels around `(row[b], column[b])` in normalised `(B, C, H, W)`.

    Zero is the mean colour here. The part of the square beyond the border falls away, as in the paper.
    """
    height, width = images.shape[-2:]

    def covered(centre: Tensor, length: int) -> Tensor:
        first = moved(centre, images.device)[:, None] - side // 2
        position = torch.arange(length, device=images.device)
        return (position >= first) & (position < first + side)

    square = covered(row, height)[:, :, None] & covered(column, width)[:, None, :]
    return images.masked_fill_(square[:, None], 0.0)
