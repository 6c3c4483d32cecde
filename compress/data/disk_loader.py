"""Batches of images that stay on disk: worker processes decode them, this process augments and normalises.

So the random choices lie where they lie for images in memory, and the batches are the same bit for bit.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from compress.data.dataset import Batch, ImageBatches, identity_collate
from compress.data.undecoded import OnDisk
from compress.errors import UserError

MAX_WORKERS = 8


class DiskLoader(DataLoader[Batch]):
    """The batches of `images`, which are on disk; `workers` processes decode (None: one for each core, up to 8)."""

    def __init__(self, images: ImageBatches, *, workers: int | None = None, **options: Any) -> None:
        assert isinstance(images.images, OnDisk)
        if workers is None:
            workers = min(cores(), MAX_WORKERS)
        super().__init__(
            _Decoding(images.images),
            num_workers=workers,
            # A loader draws a number from its generator for each new set of workers, and from the global one if it has
            # none: as often as a loader of images in memory on a CPU, unless it keeps its workers.
            persistent_workers=workers > 0 and options.get("generator") is not None,
            pin_memory=images.device.type == "cuda",
            collate_fn=identity_collate,
            **options,
        )
        self.batches = images

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch names its own class of iterators
        for decoded in super().__iter__():
            if isinstance(decoded, UserError):
                raise decoded
            index, images = decoded
            yield self.batches.finish(index, images.to(self.batches.device, non_blocking=True))


class _Decoding(Dataset[Any]):
    """What the workers do."""

    def __init__(self, images: OnDisk) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor] | UserError:
        """The indices of a batch and its images, uint8 `(B, 3, S, S)`; or the mistake: torch would alter its text."""
        try:
            return torch.as_tensor(indices, dtype=torch.int64), self.images.select(indices)
        except UserError as mistake:
            return mistake


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
