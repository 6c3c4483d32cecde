"""Images that are still encoded, as files on disk, and are decoded one by one when they are needed."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress.data.image_file import read_square


class Undecoded(ABC):
    """A sequence of encoded images. Processes that decode get a copy, so it holds no Python object for each image."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, indices: Tensor) -> "Undecoded":
        """The images at `indices`, int64 `(k,)`."""

    @abstractmethod
    def read(self, index: int, size: int) -> Tensor:
        """Image `index` as uint8 `(3, size, size)`, see `read_square`."""

    @abstractmethod
    def identity(self) -> str:
        """A hash that changes when the images do, as far as that shows without reading them."""

    def decoded(self, indices: Sequence[int], size: int, threads: int = 1) -> Tensor:
        """The images at `indices` as uint8 `(k, 3, size, size)`, channels last in memory."""
        images = torch.empty((len(indices), 3, size, size), dtype=torch.uint8, memory_format=torch.channels_last)

        def decode(place: int) -> None:
            images[place] = self.read(indices[place], size)

        if threads == 1:
            for place in range(len(indices)):
                decode(place)
        else:
            with ThreadPoolExecutor(threads) as pool:  # Pillow decodes and resizes without Python's lock
                deque(pool.map(decode, range(len(indices))), maxlen=0)
        return images


class ImageFiles(Undecoded):
    """Images in files; max_pixels: see `accepted_pixels`."""

    def __init__(self, paths: Sequence[Path] | np.ndarray, max_pixels: int | None = None) -> None:
        # Bytes in one array: a list of a million paths would be copied by every process that looks at it.
        self._paths = paths if isinstance(paths, np.ndarray) else np.array([os.fsencode(path) for path in paths])
        self._max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, indices: Tensor) -> "ImageFiles":
        return ImageFiles(self._paths[indices.numpy()], self._max_pixels)

    def read(self, index: int, size: int) -> Tensor:
        return read_square(Path(os.fsdecode(self._paths[index])), size, max_pixels=self._max_pixels)

    def identity(self) -> str:
        """Of their paths, sizes and times of change."""
        content = hashlib.sha256()
        for path in self._paths:
            status = Path(os.fsdecode(path)).stat()
            content.update(b"%s %d %d\n" % (path, status.st_size, status.st_mtime_ns))
        return content.hexdigest()


@dataclass(frozen=True)
class OnDisk:
    """Images that stay encoded, in the place of a tensor `(n, 3, size, size)`; batches are decoded on the CPU."""

    images: Undecoded
    size: int

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: Sequence[int]) -> Tensor:
        """uint8 `(k, 3, size, size)`, channels last."""
        return self.images.decoded(indices, self.size)
