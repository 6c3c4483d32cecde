"""The batched augmentation against torchvision's, image by image: `python scripts/benchmark.py data`."""

import argparse
import statistics
from collections import deque

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from compress.benchmarks import seconds, spread
from compress.data.augmentation import Augmentation, Normalisation
from compress.data.dataset import EpochSampler, ImageBatches, identity_collate

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)


class PerSample(Dataset):
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
    """One epoch of crop, flip and normalisation of 32x32 images, on one core."""
    torch.set_num_threads(1)
    pixels = np.random.default_rng(0).integers(0, 256, (arguments.images, 32, 32, 3), np.uint8)
    labels = torch.zeros(arguments.images, dtype=torch.int64)
    augmentation, normalisation = Augmentation(crop_padding=4, horizontal_flip=True), Normalisation(MEAN, DEVIATION, 32)
    images = ImageBatches(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels, normalisation, augmentation)
    ours = DataLoader(images, 128, sampler=EpochSampler(images, 0), collate_fn=identity_collate)
    theirs = DataLoader(PerSample(pixels), 128, shuffle=True)

    def epoch(loader: DataLoader) -> float:
        return seconds(lambda: deque(loader, maxlen=0))

    _, *pairs = [(epoch(ours), epoch(theirs)) for _ in range(arguments.repeats + 1)]  # the first one warms up
    speeds = [arguments.images / statistics.median(times) for times in zip(*pairs, strict=True)]
    print(f"batched against per-sample augmentation: {speeds[0]:,.0f} against {speeds[1]:,.0f} images/s")
    print(spread([slow / fast for fast, slow in pairs]))
