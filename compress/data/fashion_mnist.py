"""Fashion-MNIST: 60,000 + 10,000 gray images of 28x28 pixels in idx files.

Xiao, Rasul & Vollgraf 2017, https://arxiv.org/abs/1708.07747
"""

import gzip
import struct
import zlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torchvision import datasets

from compress.data.download import download
from compress.data.module import DataModule
from compress.data.source import Source
from compress.errors import UserError

# The four files with their MD5 sums, as torchvision lists them.
FILES = dict(datasets.FashionMNIST.resources)
UNSIGNED_BYTES = 0x08


class FashionMNIST(DataModule):
    """`data=fashion_mnist`: `root` holds the four .gz files, or torchvision's FashionMNIST/raw with them."""

    licence, hub_name = "MIT", "zalando-datasets/fashion_mnist"  # github.com/zalandoresearch/fashion-mnist

    def __init__(self, root: Annotated[str, Field(min_length=1)], **options: Any) -> None:
        super().__init__(**options)
        self.root = Path(root).expanduser()

    def prepare_data(self) -> None:
        if self._folder() is not None:
            return
        folder = self.root / "FashionMNIST" / "raw"
        try:
            for name, md5 in FILES.items():
                if not (folder / name).exists():
                    download(datasets.FashionMNIST.mirrors[0] + name, md5, folder / name)
        except OSError as failure:
            raise UserError(
                f"data.root: found no Fashion-MNIST in {self.root}, and it could not be downloaded ({failure}); "
                f"accepted: a folder with {', '.join(FILES)}"
            ) from None

    def read(self) -> Source:
        folder = self._folder()
        if folder is None:
            raise UserError(
                f"data.root: found no Fashion-MNIST in {self.root}; accepted: a folder with {', '.join(FILES)}"
            )
        images, labels, test_images, test_labels = (read_idx(_existing(folder, name)) for name in FILES)
        train, test = _checked(images, labels, folder), _checked(test_images, test_labels, folder)
        return Source(*train, *test, tuple(datasets.FashionMNIST.classes), [0.2860], [0.3530])

    def _folder(self) -> Path | None:
        for folder in (self.root, self.root / "FashionMNIST" / "raw"):
            if all(_existing(folder, name).exists() for name in FILES):
                return folder
        return None


def _existing(folder: Path, name: str) -> Path:
    """The file, or its unpacked form where only that is there."""
    packed, plain = folder / name, folder / name.removesuffix(".gz")
    return plain if plain.exists() and not packed.exists() else packed


def _checked(images: Tensor, labels: Tensor, folder: Path) -> tuple[Tensor, Tensor]:
    shapes_fit = images.shape == (len(labels), 28, 28) and labels.shape == (len(images),)
    if not shapes_fit or not len(labels) or labels.max() > 9:
        raise UserError(
            f"data.root: {folder} holds images {tuple(images.shape)} and labels {tuple(labels.shape)}; accepted: the "
            "same number of both, 28x28 pixels, labels 0..9"
        )
    return images[:, None], labels.long()


def read_idx(path: Path) -> Tensor:
    """The uint8 tensor in an idx file, gzipped or not. Raises UserError, naming the file, for anything else."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        zeros, kind, dimensions = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    except (OSError, EOFError, zlib.error, struct.error) as failure:
        raise UserError(f"{path}: cannot be read ({failure}); accepted: an idx file") from None
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if zeros != 0 or kind != UNSIGNED_BYTES or not shape or values.size != np.prod(shape):
        raise UserError(
            f"{path}: {values.size:,} bytes behind a header for {shape}; accepted: all of an idx file of unsigned bytes"
        )
    return torch.from_numpy(values.reshape(shape).copy())
