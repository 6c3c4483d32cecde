"""A frozen teacher whose logits for the training images are read where they are known, and computed once where not."""

import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.methods.frozen_teacher import FrozenEnsemble, FrozenTeacher
from compress.methods.logit_file import LogitFile
from compress.progress import console

# Chunks that are looked for again before they are computed, because another job may have written them meanwhile.
TOGETHER = 8
Views = Annotated[int, Field(ge=1)] | Literal["auto"] | None
PROBED, TOLERANCE = 16, 0.05  # images of a known chunk that are computed again, and how far off they may be


class CachedTeacher:
    """Stands for `teacher` where training images have `views` appearances, which take turns from epoch to epoch.

    `at` gives the logits of training images by their indices, float32 `(B, C)` that went through float16. Those of a
    view are all there from the beginning of its first epoch: what `opened(view)` does not know yet is computed then, in
    chunks that do not depend on the order of the epoch, so that it makes no difference to a run which of several jobs
    did so. `opened(None)` is a file in memory, None where there is no room for one either: then each logit is computed
    when it is asked for. `images(view, batches)` yields the images of each batch of indices.
    """

    def __init__(
        self,
        teacher: FrozenTeacher | FrozenEnsemble,
        views: int,
        opened: Callable[[int | None], LogitFile | None],
        images: Callable[[int, Sequence[Sequence[int]]], Iterable[Tensor]],
        device: torch.device,
    ) -> None:
        self.teacher, self.views, self.opened, self.images, self.device = teacher, views, opened, images, device
        self.files: dict[int, LogitFile | None] = {}
        self.view: int | None = None
        self.table: Tensor | None = None
        self.computed, self.read, self.seconds = 0, 0, 0.0

    def to(self, device: torch.device) -> None:
        """See `FrozenTeacher.to`."""
        self.teacher.to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """The logits `(B, C)` of any images, as the teacher computes them."""
        return self.teacher(images)

    def at(self, index: Tensor | None, images: Tensor) -> Tensor:
        """The logits of the training images at `index`, int64 `(B,)`, which are `images` in the epoch begun last."""
        if index is None or self.table is None:
            return self.teacher(images).half().float()
        return self.table.index_select(0, index).float()

    def note(self, index: Tensor | None) -> None:
        """Counts the logits that are read for a batch."""
        if index is not None and self.table is not None:
            self.read += len(index)

    def begin_epoch(self, epoch: int) -> None:
        """Has the logits of this epoch's view ready."""
        view = epoch % self.views
        if view == self.view:
            return
        if view not in self.files:
            self.files[view] = self._filled(view)
        file = self.files[view]
        self.table = None if file is None else torch.from_numpy(file.values).to(self.device)
        self.view = view

    def record(self) -> dict[str, Any]:
        """What `result.json` says of it."""
        files = [file for file in self.files.values() if file is not None]
        return {
            "views": self.views,
            "files": [str(file.path) for file in files if file.path is not None],
            "bytes": sum(file.bytes for file in files),
            "computed": self.computed,
            "read": self.read,
            "seconds": round(self.seconds, 2),
        }

    def _filled(self, view: int) -> LogitFile | None:
        file, started, before = self.opened(view), time.perf_counter(), self.computed
        if file is None:
            return None
        known = [chunk for chunk in range(file.chunks) if file.has(chunk)]
        if known and not self._agrees(file, view, known[0]):
            console.print(f"teacher cache: {file.path} has the logits of another teacher, which stay unread")
            file, known = self.opened(None), []
            if file is None:
                return None
        missing = sorted(set(range(file.chunks)) - set(known))
        # Jobs that begin together begin at different places, and find there what the others have done.
        first = random.Random(os.getpid()).randrange(len(missing) or 1)
        missing = [*missing[first:], *missing[:first]]
        for start in range(0, len(missing), TOGETHER):
            chunks = [chunk for chunk in missing[start : start + TOGETHER] if not file.has(chunk)]
            for chunk, images in zip(chunks, self.images(view, [file.rows(chunk) for chunk in chunks]), strict=True):
                file.write(chunk, self.teacher(images))
                self.computed += len(images)
        computed, seconds = self.computed - before, time.perf_counter() - started
        self.seconds += seconds
        console.print(
            f"teacher cache: {file.images - computed:,} logits found, {computed:,} computed in {seconds:.1f} s"
        )
        return file

    def _agrees(self, file: LogitFile, view: int, chunk: int) -> bool:
        """Whether what the file knows is what this teacher says of these images, but for rounding."""
        rows = file.rows(chunk)[:PROBED]
        [images] = self.images(view, [rows])
        found, expected = torch.from_numpy(file.values[rows.start : rows.stop]).float(), self.teacher(images).cpu()
        return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())
