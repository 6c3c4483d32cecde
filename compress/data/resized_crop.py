"""Random resized crop: a part of the image, of random area and aspect ratio, is resized to the size of the network's.

Szegedy et al. 2015, https://arxiv.org/abs/1409.4842, section 6; distributions are those of torchvision's
RandomResizedCrop. Every crop has a size of its own, so they are resized one by one: on a CPU, weighting whole batches
by matrices would be more arithmetic than that.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from compress.data.draws import Stream, draw_uniform

RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10  # to draw a box within the image


def draw_boxes(count: int, side: int, scale: Sequence[float], seed: int, epoch: int) -> Tensor:
    """Top, left, height and width, int64 `(count, 4)`, of boxes in square images of `side` pixels.

    Their areas are shares of the image drawn from `scale`. A box is the first that fits of ATTEMPTS, or all the image.
    """

    def uniform(low: float, high: float, stream: Stream) -> Tensor:
        return low + (high - low) * draw_uniform(count * ATTEMPTS, stream, seed, epoch).view(count, ATTEMPTS)

    area = side**2 * uniform(scale[0], scale[1], Stream.CROP_AREA)
    ratio = uniform(math.log(RATIO[0]), math.log(RATIO[1]), Stream.CROP_RATIO).exp()
    widths, heights = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (widths > 0) & (widths <= side) & (heights > 0) & (heights <= side)
    first = fits.int().argmax(dim=1, keepdim=True)
    height, width = (
        torch.where(fits.any(dim=1), lengths.gather(1, first)[:, 0], side) for lengths in (heights, widths)
    )
    top, left = (
        (draw_uniform(count, stream, seed, epoch) * (side - length + 1)).long()
        for stream, length in ((Stream.CROP_TOP, height), (Stream.CROP_LEFT, width))
    )
    return torch.stack([top, left, height, width], dim=1)


def resized_crops(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The `boxes` `(B, 4)` of uint8 `(B, 3, S, S)`, each resized to `(3, size, size)`, bilinearly with antialiasing."""
    # Late: importing torchvision takes longer than loading a small network and classifying with it.
    from torchvision.transforms.v2 import functional

    shape = (len(images), images.shape[1], size, size)
    result = torch.empty(shape, dtype=torch.uint8, device=images.device, memory_format=torch.channels_last)
    for image, target, (top, left, height, width) in zip(images, result, boxes.tolist(), strict=True):
        target.copy_(functional.resized_crop(image, top, left, height, width, [size, size], antialias=True))
    return result
