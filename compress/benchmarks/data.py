"""The batched augmentation, and images from disk, against torchvision's: `python scripts/benchmark.py data`."""

import argparse
import statistics
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from compress.benchmarks import seconds, spread
from compress.data.augmentation import Augmentation
from compress.data.dataset import EpochSampler, ImageBatches, identity_collate
from compress.data.disk_loader import DiskLoader, cores
from compress.data.image_file import image_files
from compress.data.normalisation import Normalisation
from compress.data.undecoded import ImageFiles, OnDisk

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--files", type=int, default=500, help="JPEGs that are written, and read from disk")
    parser.add_argument("--side", type=int, default=500, help="their longer side in pixels")
    parser.add_argument("--workers", type=int, default=cores(), help="processes that decode them")


class PerSample(Dataset[Any]):
    """torchvision's v1 pipeline: one PIL image at a time."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, DEVIATION),
            ]
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), 0


def run(arguments: argparse.Namespace) -> None:
    """Crop, flip and normalisation of 32x32 images on one core, then photos from disk as they are trained on."""
    torch.set_num_threads(1)
    print("batched against per-sample augmentation")
    _compare(*_in_memory(arguments.images), arguments.images, arguments.repeats)
    print(f"JPEGs of {arguments.side} pixels from disk against ImageFolder, {arguments.workers} workers each")
    with tempfile.TemporaryDirectory() as folder:
        loaders = _from_disk(Path(folder), arguments.files, arguments.side, arguments.workers)
        _compare(*loaders, arguments.files, arguments.repeats)


def _compare(ours: DataLoader[Any], theirs: DataLoader[Any], images: int, repeats: int) -> None:
    """Reads an epoch of either in turn."""

    def epoch(loader: DataLoader[Any]) -> float:
        return seconds(lambda: deque(loader, maxlen=0))

    _, *pairs = [(epoch(ours), epoch(theirs)) for _ in range(repeats + 1)]  # the first one warms up
    speeds = [images / statistics.median(times) for times in zip(*pairs, strict=True)]
    print(f"  {speeds[0]:,.0f} against {speeds[1]:,.0f} images/s, {spread([slow / fast for fast, slow in pairs])}")


def _in_memory(count: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = torch.zeros(count, dtype=torch.int64)
    augmentation, normalisation = Augmentation(crop_padding=4, horizontal_flip=True), Normalisation(MEAN, DEVIATION, 32)
    images = ImageBatches(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels, normalisation, augmentation)
    ours = DataLoader(images, 128, sampler=EpochSampler(images, 0), collate_fn=identity_collate)
    return ours, DataLoader(PerSample(pixels), 128, shuffle=True)


def _from_disk(folder: Path, count: int, side: int, workers: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Random resized crops of 224 pixels, flipped and normalised; ours of central squares of 320 pixels."""
    (folder / "class").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (8, 30, 40, 3), np.uint8)
    for index in range(count):  # as smooth as photos are
        image = Image.fromarray(noise[index % 8]).resize((side, side * 3 // 4), Image.Resampling.BICUBIC)
        image.save(folder / "class" / f"{index}.jpg", quality=90)
    labels = torch.zeros(count, dtype=torch.int64)
    augmentation = Augmentation(horizontal_flip=True, random_resized_crop=(0.08, 1.0))
    normalisation = Normalisation(MEAN, DEVIATION, 224)
    images = ImageBatches(OnDisk(ImageFiles(image_files(folder)), 320), labels, normalisation, augmentation)
    sampler, generator = EpochSampler(images, 0), torch.Generator()
    ours = DiskLoader(images, batch_size=64, sampler=sampler, generator=generator, workers=workers)
    steps = [
        transforms.RandomResizedCrop(224),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, DEVIATION),
    ]
    folder_set = ImageFolder(str(folder), transforms.Compose(steps))
    theirs = DataLoader(folder_set, 64, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    return ours, theirs
