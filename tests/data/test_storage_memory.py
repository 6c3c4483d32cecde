"""Images on disk in any number take no more memory than a few batches of them."""

import os
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compress.data.dataset import EpochSampler, ImageBatches
from compress.data.disk_loader import DiskLoader
from compress.data.normalisation import Normalisation
from compress.data.undecoded import ImageFiles, OnDisk

SMAPS = Path("/proc/self/smaps_rollup")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SMAPS.exists(), reason="only Linux says what a process shares")]


def megabytes(workers):
    """What this process and its `workers` occupy; pages that they share count once."""
    total = 0
    for process in (os.getpid(), *(worker.pid for worker in workers)):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def write_jpegs(folder, count, size):
    shade = np.add.outer(np.arange(size), np.arange(size)).astype(np.uint8)
    paths = [folder / f"{index:07}.jpg" for index in range(count)]
    for index, path in enumerate(paths):
        Image.fromarray(shade ^ np.uint8(index % 251)).convert("RGB").save(path)
    return paths


def loader_of(paths, size):
    normalisation = Normalisation([0.5] * 3, [0.25] * 3, size)
    images = ImageBatches(OnDisk(ImageFiles(paths), size), torch.zeros(len(paths), dtype=torch.int64), normalisation)
    sampler, generator = EpochSampler(images, 0), torch.Generator()
    return DiskLoader(images, batch_size=50, sampler=sampler, workers=2, generator=generator)


def growth(loader):
    """How many MB more the processes occupy after the second epoch than after the first, which fills their heaps."""
    occupied = []
    for _ in range(2):
        deque(loader, maxlen=0)
        occupied.append(megabytes(loader._iterator._workers))
    return occupied[1] - occupied[0]


def test_memory_stays_steady_over_many_images(tmp_path):
    paths = write_jpegs(tmp_path, 200, 96)
    # The 8,000 images of an epoch would be 221 MB as bytes.
    assert growth(loader_of(paths * 40, 96)) < 80


@pytest.mark.soak
def test_memory_stays_steady_over_two_hundred_thousand_files(tmp_path):
    # 2.4 GB as bytes.
    assert growth(loader_of(write_jpegs(tmp_path, 200_000, 64), 64)) < 80
