"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 colour images of 32x32 pixels, in the files that torchvision uses.

Krizhevsky 2009. The files are Python pickles, which can run code when they are read: only bytes that have the MD5 sum
of the published file are unpickled.
"""

import hashlib
import pickle
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torchvision import datasets

from compress.data.download import download
from compress.data.module import DataModule
from compress.data.source import Source
from compress.errors import UserError


def published_sums(published: type[datasets.CIFAR10]) -> dict[str, str]:
    """The MD5 sums that torchvision lists, by name: of the archive and of the files in it that are read."""
    meta = published.meta
    return dict([(published.filename, published.tgz_md5), *_batches(published), (meta["filename"], meta["md5"])])


def _batches(published: type[datasets.CIFAR10]) -> list[tuple[str, str]]:
    return [*published.train_list, *published.test_list]


class CIFAR10(DataModule):
    """`data=cifar10`: `root` holds cifar-10-batches-py, or the archive cifar-10-python.tar.gz."""

    hub_name = "uoft-cs/cifar10"
    published: ClassVar[type[datasets.CIFAR10]] = datasets.CIFAR10
    sums: ClassVar[Mapping[str, str]] = published_sums(datasets.CIFAR10)
    mean_published: ClassVar[tuple[float, float, float]] = (0.4914, 0.4822, 0.4465)
    deviation_published: ClassVar[tuple[float, float, float]] = (0.2023, 0.1994, 0.2010)

    def __init__(self, root: Annotated[str, Field(min_length=1)], **options: Any) -> None:
        super().__init__(**options)
        self.root = Path(root).expanduser()
        self.folder = self.root / self.published.base_folder

    def prepare_data(self) -> None:
        files = [*(name for name, _ in _batches(self.published)), self.published.meta["filename"]]
        missing = [name for name in files if not (self.folder / name).is_file()]
        if not missing:
            return
        if self.folder.exists():
            raise UserError(f"data.root: {self.folder} lacks {', '.join(missing)}; accepted: all files of the archive")
        archive = self.root / self.published.filename
        if not archive.exists():
            self._download(archive)
        self._unpack(archive)

    def _download(self, archive: Path) -> None:
        try:
            download(self.published.url, self.sums[archive.name], archive)
        except OSError as failure:
            raise UserError(
                f"data.root: found no {self.published.base_folder} in {self.root}, and {self.published.url} could "
                f"not be downloaded ({failure}); accepted: a folder that holds {self.published.filename}"
            ) from None

    def _unpack(self, archive: Path) -> None:
        try:
            with archive.open("rb") as stream:
                self._check_sum(archive, hashlib.file_digest(stream, "md5").hexdigest())
            # In a folder that takes its name last: unpacking that breaks off must not leave half a data set behind.
            with tempfile.TemporaryDirectory(dir=self.root) as temporary, tarfile.open(archive) as opened:
                opened.extractall(temporary, filter="data")
                (Path(temporary) / self.published.base_folder).rename(self.folder)
        except OSError as failure:
            raise UserError(f"data.root: {archive} cannot be unpacked ({failure}); accepted: a readable file") from None

    def read(self) -> Source:
        names = self._load(self.published.meta["filename"])[self.published.meta["key"]]
        train, test = self._read_batches(self.published.train_list), self._read_batches(self.published.test_list)
        return Source(*train, *test, tuple(names), self.mean_published, self.deviation_published)

    def _read_batches(self, batches: Iterable[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        contents = [self._load(name) for name, _ in batches]
        pixels = torch.cat([torch.from_numpy(content["data"]) for content in contents])
        # CIFAR-100 has coarse labels too.
        labels = [label for content in contents for label in content.get("labels") or content["fine_labels"]]
        return pixels.view(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.int64)

    def _load(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            content = path.read_bytes()
        except OSError as failure:
            raise UserError(f"{path}: cannot be read ({failure}); accepted: a file of the CIFAR archive") from None
        self._check_sum(path, hashlib.md5(content, usedforsecurity=False).hexdigest())
        loaded: dict[str, Any] = pickle.loads(content, encoding="latin1")
        return loaded

    def _check_sum(self, path: Path, digest: str) -> None:
        expected = self.sums[path.name]
        if digest != expected:
            raise UserError(f"{path}: found the MD5 sum {digest}; accepted: {expected}, that of the published file")


class CIFAR100(CIFAR10):
    """`data=cifar100`: `root` holds cifar-100-python, or the archive cifar-100-python.tar.gz. The fine labels."""

    hub_name = "uoft-cs/cifar100"
    published: ClassVar[type[datasets.CIFAR10]] = datasets.CIFAR100
    sums: ClassVar[Mapping[str, str]] = published_sums(datasets.CIFAR100)
    mean_published: ClassVar[tuple[float, float, float]] = (0.5071, 0.4867, 0.4408)
    deviation_published: ClassVar[tuple[float, float, float]] = (0.2675, 0.2565, 0.2761)
