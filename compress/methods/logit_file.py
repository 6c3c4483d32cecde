"""Logits of a list of images in a file that any number of processes fill and read together."""

import errno
import json
import mmap
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from torch import Tensor

from compress.errors import UserError
from compress.files import remove_leftovers, write_atomically

KIND = "compress-logits-1"
HEADER = 4096  # bytes, so that what follows begins at a page
CHUNK = 256  # images whose logits are computed, written and checked together
WRITTEN = 1 << 32  # beside the checksum of a chunk that is there


class LogitFile:
    """float16 `(images, classes)` in chunks of `CHUNK` images, each with a checksum, in the file at `path`.

    The file has all its bytes from the beginning, and is mapped into memory: what one process writes the others see.
    A chunk counts when its checksum is right, which is looked at before it is used, so that neither a process killed
    in the middle of one nor damage is ever taken for logits. The checksum covers `about`, which says whose logits they
    are: a file of others, or one of another size, is written anew.

    Where the file can only be read, what is added stays in this process. Raises OSError where there is neither a file
    nor room for one, with `path` None MemoryError where there is no room in memory.
    """

    def __init__(self, path: Path | None, images: int, classes: int, about: Mapping[str, Any]) -> None:
        self.path, self.images = path, images
        self.chunks = -(-images // CHUNK)
        description = {"kind": KIND, "images": images, "classes": classes, **about}
        self._header = json.dumps(description, sort_keys=True).encode().ljust(HEADER)
        self._salt = zlib.crc32(self._header)
        self.bytes = self.size(images, classes)
        memory = mmap.mmap(-1, self.bytes) if path is None else self._mapped(path)
        self._checks = np.frombuffer(memory, "<u8", self.chunks, HEADER)
        self.values = np.frombuffer(memory, "<f2", offset=HEADER + 8 * self.chunks).reshape(images, classes)

    @staticmethod
    def size(images: int, classes: int) -> int:
        """The bytes of a file."""
        return HEADER + 8 * -(-images // CHUNK) + 2 * images * classes

    def _mapped(self, path: Path) -> mmap.mmap:
        if not self._fits(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if not self._fits(path):
                    remove_leftovers(path.parent, path.stem)
                    write_atomically(path, self._create)
        try:
            with path.open("r+b") as file:
                return mmap.mmap(file.fileno(), self.bytes)
        except OSError as failure:
            if failure.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            with path.open("rb") as file:
                return mmap.mmap(file.fileno(), self.bytes, access=mmap.ACCESS_COPY)

    def _fits(self, path: Path) -> bool:
        try:
            with path.open("rb") as file:
                return path.stat().st_size == self.bytes and file.read(HEADER) == self._header
        except FileNotFoundError:
            return False

    def _create(self, path: Path) -> None:
        with path.open("wb") as file:
            file.write(self._header)
            # Written out, because a full disk would end a process that writes to a hole of a mapped file.
            left = self.bytes - HEADER
            while left:
                left -= file.write(bytes(min(left, 1 << 20)))

    def rows(self, chunk: int) -> range:
        """The images of a chunk."""
        return range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.images))

    def has(self, chunk: int) -> bool:
        """Whether the logits of a chunk are there, undamaged."""
        return bool(self._checks[chunk] == self._check(chunk))

    def write(self, chunk: int, logits: Tensor) -> None:
        """Raises UserError for `logits`, `(len(self.rows(chunk)), classes)`, that float16 cannot hold."""
        values = logits.half()
        if not bool(values.isfinite().all()):
            raise UserError(
                f"method.teacher_cache: found logits of the teacher up to {float(logits.abs().max()):.3g}, more than "
                "float16 can hold; accepted: null"
            )
        rows = self.rows(chunk)
        self.values[rows.start : rows.stop] = values.cpu().numpy()
        self._checks[chunk] = self._check(chunk)

    def _check(self, chunk: int) -> int:
        rows = self.rows(chunk)
        salt = zlib.crc32(chunk.to_bytes(8, "little"), self._salt)
        return WRITTEN | zlib.crc32(self.values[rows.start : rows.stop].data, salt)
