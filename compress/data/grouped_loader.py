"""Batches that are made several at a time, for a GPU, where the operations on one take as long as those on several."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from compress.data.dataset import Batch, ImageBatches, identity_collate

# Of the images that are made at a time, as floats, and how many batches these are at most.
BYTES, BATCHES = 1 << 26, 16


class GroupedLoader(DataLoader[Batch]):
    """The batches of `images`, which are in memory: those of a DataLoader bit for bit."""

    def __init__(self, images: ImageBatches, **options: Any) -> None:
        super().__init__(images, collate_fn=identity_collate, **options)
        self.images = images

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch names its own class of iterators
        assert self.batch_sampler is not None  # as there are batches
        batches, count = iter(self.batch_sampler), 1
        while group := list(islice(batches, count)):
            made = self.images.__getitems__([index for batch in group for index in batch])
            parts = [part.split([len(batch) for batch in group]) for part in made]
            yield from zip(*parts, strict=True)
            count = max(1, min(BATCHES, BYTES * count // (made[0].numel() * made[0].element_size())))
