"""What reading a data set yields: images as bytes, labels, names of the classes, normalisation; and its splits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.data.undecoded import OnDisk, Undecoded

CHUNK = 1024


@dataclass(frozen=True)
class Source:
    """A data set before any split or resizing.

    Images are uint8 `(n, C, H, W)` with C = 1 or 3, or not decoded yet; labels are int64 `(n,)` in 0..classes-1. `mean`
    and `standard_deviation` are those of the training pixels scaled to 0..1, one number or one per channel.
    `validation`: images and labels, None where they are to be split from those for training.
    """

    train_images: Tensor | Undecoded
    train_labels: Tensor
    test_images: Tensor | Undecoded
    test_labels: Tensor
    class_names: tuple[str, ...]
    mean: Sequence[float]
    standard_deviation: Sequence[float]
    validation: tuple[Tensor | Undecoded, Tensor] | None = None


@dataclass(frozen=True)
class SourceSplit:
    """Images of a `Source`, uint8 `(n, C, H, W)` or not decoded yet, and class indices `(n,)`."""

    images: Tensor | Undecoded
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> "SourceSplit":
        return SourceSplit(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Split:
    """Images of one size, uint8 `(n, 3, S, S)` or on disk, and class indices `(n,)`."""

    images: Tensor | OnDisk
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Images:
    """A data set that has been read, split and resized.

    `splits` has train, validation and test: uint8 `(n, 3, image_size, image_size)`, for training of `stored_size`,
    channels last, on the device of the module, or `OnDisk`. `mean` and `standard_deviation` are those of the `Source`.
    """

    splits: dict[str, Split]
    class_names: tuple[str, ...]
    mean: Sequence[float]
    standard_deviation: Sequence[float]


def resized_rgb(images: Tensor, image_size: int) -> Tensor:
    """uint8 `(n, C, H, W)` as `(n, 3, image_size, image_size)` with the channels last in memory.

    Resizing is bilinear with antialiasing; grey is repeated over the channels, here and not in every batch, where it
    would cost more than the augmentation itself. Works in chunks, so that no float copy of all images ever exists.
    """
    shape = (len(images), 3, image_size, image_size)
    if images.shape == shape and images.is_contiguous(memory_format=torch.channels_last):
        return images
    result = torch.empty(shape, dtype=torch.uint8, device=images.device, memory_format=torch.channels_last)
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        if chunk.shape[-2:] != (image_size, image_size):
            # Late: importing torchvision takes longer than loading a small network and classifying with it.
            from torchvision.transforms.v2 import functional as images_functional

            chunk = images_functional.resize(chunk, [image_size, image_size], antialias=True)
        result[start : start + CHUNK] = chunk
    return result


def pixel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of uint8 `(n, C, H, W)` scaled to 0..1, from exact histograms."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        means.append(mean.item())
        deviations.append((share * (values - mean).square()).sum().sqrt().item())
    return means, deviations
