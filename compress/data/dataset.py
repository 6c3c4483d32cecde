"""A data set that answers whole batches, and the sampler that gives it its epoch."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from compress.data.augmentation import Augmentation, Normalisation
from compress.data.draws import permutation

Batch = tuple[Tensor, Tensor]


class ImageBatches(Dataset[Batch]):
    """Images and labels in memory, augmented and normalised a batch at a time.

    `images`: uint8 `(n, 3, H, W)`, channels last; `labels`: int64 `(n,)`; batches come out on their device. Without an
    augmentation the images are only normalised. The random choices of an epoch are tables over the whole set, drawn
    by `set_epoch` from (seed, epoch), so what happens to an image depends on (seed, epoch, index) and not on its batch.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        normalisation: Normalisation,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.images = images
        self.labels = labels
        # (n, H, W, C): selecting along the first dimension then copies whole images.
        self._pixels = images.permute(0, 2, 3, 1)
        self._normalisation = normalisation
        self._augmentation = augmentation
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        if self._augmentation is not None:
            self._choices = self._augmentation.draw(len(self), self.images.shape[-1], self._seed, epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Images float32 `(B, 3, H, W)`, channels last, and labels int64 `(B,)`."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        moved = index.to(self.images.device)
        images = self._pixels.index_select(0, moved).permute(0, 3, 1, 2)
        if self._augmentation is None:
            images = self._normalisation(images)
        else:
            images = self._augmentation(images, self._choices[index], self._normalisation)
        return images, self.labels.index_select(0, moved)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]


class EpochSampler(Sampler[int]):
    """All indices in an order that follows from (seed, epoch).

    Lightning calls `set_epoch` on the sampler of a loader and on nothing else, so the sampler hands it on to the set.
    """

    def __init__(self, dataset: ImageBatches, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(permutation(len(self._dataset), self._seed, self._epoch))

    def __len__(self) -> int:
        return len(self._dataset)


def as_it_is(batch: Batch) -> Batch:
    """The collate function of a set whose batches are already tensors; at module level, so that it can be pickled."""
    return batch
