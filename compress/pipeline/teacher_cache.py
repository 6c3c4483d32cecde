"""Whether a run's teacher answers each training image anew or once, and where its answers are kept."""

import re
from pathlib import Path

import torch

from compress import models
from compress.checksums import digest
from compress.data.memory import MEMORY_SHARE, free_bytes
from compress.methods.cached_teacher import CachedTeacher
from compress.methods.frozen_teacher import FrozenEnsemble, FrozenTeacher
from compress.methods.logit_file import LogitFile
from compress.pipeline.parts import Parts
from compress.progress import console


def with_cache(
    teacher: FrozenTeacher | FrozenEnsemble, parts: Parts, name: str
) -> FrozenTeacher | FrozenEnsemble | CachedTeacher:
    """`teacher`, behind a cache of its logits where `method.teacher_cache` and the run's data allow one.

    The files lie beside the teachers, `name` is in theirs. They are those of equal teachers, precisions, images,
    augmentations and, where that is random, seeds: of other runs, stages and jobs, too.
    """
    views = cached_views(parts)
    if views is None:
        if parts.method_options.get("teacher_cache") == "auto":
            console.print(f"teacher cache: off, {_why_not(parts)}")
        return teacher
    data = parts.data
    data.replay(views)
    about = {
        "teacher": teacher.digest(),
        "precision": str(models.low_precision_dtype(parts.device) or torch.float32),
        "images": data.training_identity(),
    }
    key = digest(repr(about))[:16]
    stem = f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}-{key}"
    folder = Path(parts.plain["output_directory"]) / "teachers"
    count, classes = len(data.splits["train"]), data.num_classes

    def opened(view: int | None) -> LogitFile | None:
        if view is not None:
            path = folder / f"{stem}-view{view}.logits"
            try:
                return LogitFile(path, count, classes, {**about, "view": view})
            except OSError as failure:
                console.print(f"teacher cache: {path}: {failure.strerror}; the logits stay in memory")
        if LogitFile.size(count, classes) * views > MEMORY_SHARE * free_bytes(torch.device("cpu")):
            console.print("teacher cache: off, there is no room for it")
            return None
        return LogitFile(None, count, classes, about)

    return CachedTeacher(teacher, views, opened, data.training_view, parts.device)


def cached_views(parts: Parts) -> int | None:
    """How many views of each image the run's teacher answers once; None where it answers in every step."""
    views: int | str | None = parts.method_options.get("teacher_cache")
    if views == "auto":
        views = 1 if _why_not(parts) is None else None
    return None if views is None or parts.updates_teacher else int(views)


def _why_not(parts: Parts) -> str | None:
    """Why the teacher has to answer in every step under `auto`; None where it does not."""
    if parts.mixup is not None and parts.mixup.teacher_sees == "mixed":
        return "the teacher sees blended images"
    if parts.data.augmentation.is_random:
        return "images are augmented at random; method.teacher_cache=VIEWS replays so many views of each"
    if parts.plain["trainer"].get("limit_train_batches") is not None:
        return "trainer.limit_train_batches leaves out images"
    return None
