"""A data set that returns batches instead of single images, and the sampler that gives it its epoch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from compress.data.augmentation import Augmentation
from compress.data.draws import permutation
from compress.data.normalisation import Normalisation
from compress.data.source import resized_rgb
from compress.data.transfer import moved
from compress.data.undecoded import OnDisk

Batch = tuple[Tensor, ...]
T = TypeVar("T")


class ImageBatches(Dataset[Batch]):
    """Images and labels, in memory or with the images on disk, augmented and normalised a batch at a time.

    `images`: uint8 `(n, 3, S, S)`, channels last, or on disk; `labels`: int64 `(n,)`; batches come out on the device of
    the labels, in the size that the normalisation takes. Without an augmentation the images are only normalised. The
    random choices of an epoch are tables over all its images, drawn by `set_epoch` from (seed, epoch), so what happens
    to an image depends on (seed, epoch, index) and not on its batch. With a number of `views` they are those of the
    epoch `epoch % views`, and a batch has a third part, the index of each image.
    """

    def __init__(
        self,
        images: Tensor | OnDisk,
        labels: Tensor,
        normalisation: Normalisation,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        views: int | None = None,
    ) -> None:
        self.images = images
        self.labels = labels
        self.device = labels.device
        self._normalisation = normalisation
        self._augmentation = augmentation
        self._seed = seed
        self._views = views
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        if self._augmentation is not None:
            epoch %= self._views or epoch + 1
            stored_size = self.images.size if isinstance(self.images, OnDisk) else self.images.shape[-1]
            size = self._normalisation.width
            self._choices = self._augmentation.draw(len(self), size, self._seed, epoch, stored_size)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Images float32 `(B, 3, H, W)`, channels last, and labels int64 `(B,)`; with views, `indices` too."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        if isinstance(self.images, OnDisk):
            images = self.images.select(indices).to(self.device)
        else:
            # (n, H, W, C): selecting along the first dimension then copies one run of bytes per image.
            pixels = self.images.permute(0, 2, 3, 1)
            here = moved(index, self.device)
            return self.finish(index, pixels.index_select(0, here).permute(0, 3, 1, 2), here)
        return self.finish(index, images)

    def finish(self, index: Tensor, images: Tensor, here: Tensor | None = None) -> Batch:
        """The batch of the images at `index`, given as uint8 `(B, 3, S, S)` on the device; `here` is `index` there."""
        if self._augmentation is None:
            images = self._normalisation(resized_rgb(images, self._normalisation.width))
        else:
            images = self._augmentation(images, self._choices[index], self._normalisation)
        here = moved(index, self.device) if here is None else here
        labels = self.labels.index_select(0, here)
        return (images, labels) if self._views is None else (images, labels, here)


@dataclass(frozen=True)
class Share:
    """The slice of every batch of `batch_size` images that the process `rank` of `world_size` trains on.

    All slices are of equal size: `batch_size` is a multiple of `world_size`.
    """

    rank: int = 0
    world_size: int = 1
    batch_size: int = 1

    def of(self, order: Sequence[int]) -> Sequence[int]:
        """This process's part of `order`: its slices of the full batches; all of `order` where there is one process."""
        if self.world_size == 1:
            return order
        size = self.batch_size // self.world_size
        starts = range(self.rank * size, len(order) // self.batch_size * self.batch_size, self.batch_size)
        return [index for start in starts for index in order[start : start + size]]


def evaluation_batches(count: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """The batches of the process `rank`: every index below `count` is in one batch of one process.

    All processes have the same number of batches, because they synchronise after every one. Raises ValueError for
    more processes than indices.
    """
    if count < world_size:
        raise ValueError(f"{count} images cannot be shared by {world_size} processes")
    parts = world_size * min(-(-count // (batch_size * world_size)), count // world_size)
    edges = [count * part // parts for part in range(parts + 1)]
    return [list(range(edges[part], edges[part + 1])) for part in range(rank, parts, world_size)]


class EpochSampler(Sampler[int]):
    """All indices in an order that follows from (seed, epoch), or the `share` of one process in it.

    Lightning calls `set_epoch` on the sampler of a loader and on nothing else, so the sampler hands it on to the set.
    """

    def __init__(self, dataset: ImageBatches, seed: int, share: Share = Share()) -> None:
        self._dataset = dataset
        self._share = share
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(self._share.of(permutation(len(self._dataset), self._seed, self._epoch)))

    def __len__(self) -> int:
        return len(self._share.of(range(len(self._dataset))))


def identity_collate(batch: T) -> T:
    """The collate function of a set whose batches are already tensors; at module level, so that it can be pickled."""
    return batch
