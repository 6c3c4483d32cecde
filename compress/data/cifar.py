"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 colour images of 32x32 pixels, in the files that torchvision uses.

Krizhevsky 2009. The batches are Python pickles; they are read by an unpickler that admits arrays and nothing else.
"""

import codecs
import pickle
import tarfile
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy._core import multiarray
from pydantic import Field
from torch import Tensor
from torchvision import datasets

from compress.data.download import download
from compress.data.module import DataModule
from compress.data.source import Source
from compress.errors import UserError


class CIFAR10(DataModule):
    """`data=cifar10`: `root` holds cifar-10-batches-py, or the archive cifar-10-python.tar.gz."""

    published: ClassVar[type] = datasets.CIFAR10
    labels_key: ClassVar[str] = "labels"
    names_file: ClassVar[str] = "batches.meta"
    names_key: ClassVar[str] = "label_names"
    mean_published: ClassVar[tuple[float, float, float]] = (0.4914, 0.4822, 0.4465)
    deviation_published: ClassVar[tuple[float, float, float]] = (0.2023, 0.1994, 0.2010)

    def __init__(self, root: Annotated[str, Field(min_length=1)], **options: Any) -> None:
        super().__init__(**options)
        self.root = Path(root)
        self.folder = self.root / self.published.base_folder
        self.train_files = [name for name, _ in self.published.train_list]
        self.test_files = [name for name, _ in self.published.test_list]

    def prepare_data(self) -> None:
        missing = [name for name in self._files() if not (self.folder / name).is_file()]
        if not missing:
            return
        if self.folder.exists():
            raise UserError(
                f"data.root: {self.folder} lacks {', '.join(missing)}; accepted: all that the archive holds"
            )
        archive = self.root / self.published.filename
        if not archive.exists():
            try:
                download(self.published.url, self.published.tgz_md5, archive)
            except OSError as failure:
                raise UserError(
                    f"data.root: found no {self.published.base_folder} in {self.root}, and {self.published.url} could "
                    f"not be downloaded ({failure}); accepted: a folder that holds {self.published.filename}"
                ) from None
        try:
            with tarfile.open(archive) as opened:
                opened.extractall(self.root, filter="data")
        except (tarfile.TarError, OSError, EOFError) as failure:
            raise UserError(
                f"data.root: {archive} cannot be unpacked ({failure}); accepted: the whole archive"
            ) from None

    def read(self) -> Source:
        names = _load(self.folder / self.names_file, self.names_key)
        train, test = (self._images(files) for files in (self.train_files, self.test_files))
        return Source(*train, *test, tuple(names), self.mean_published, self.deviation_published)

    def _files(self) -> list[str]:
        return [*self.train_files, *self.test_files, self.names_file]

    def _images(self, files: list[str]) -> tuple[Tensor, Tensor]:
        pixels, labels = [], []
        for name in files:
            data, target = _load(self.folder / name, "data"), _load(self.folder / name, self.labels_key)
            if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (len(target), 3 * 32 * 32):
                raise UserError(f"{self.folder / name}: its data are not rows of 3,072 bytes; accepted: a CIFAR batch")
            pixels.append(torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()))
            labels.append(torch.tensor(target, dtype=torch.int64))
        return torch.cat(pixels), torch.cat(labels)


class CIFAR100(CIFAR10):
    """`data=cifar100`: `root` holds cifar-100-python, or the archive cifar-100-python.tar.gz. The fine labels."""

    published: ClassVar[type] = datasets.CIFAR100
    labels_key: ClassVar[str] = "fine_labels"
    names_file: ClassVar[str] = "meta"
    names_key: ClassVar[str] = "fine_label_names"
    mean_published: ClassVar[tuple[float, float, float]] = (0.5071, 0.4867, 0.4408)
    deviation_published: ClassVar[tuple[float, float, float]] = (0.2675, 0.2565, 0.2761)


class _ArraysOnly(pickle.Unpickler):
    """Plain containers, text, numbers and numpy arrays; anything else in the file is refused, not called."""

    allowed: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): codecs.encode,
        ("numpy.core.multiarray", "_reconstruct"): multiarray._reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): multiarray._reconstruct,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array") from None


def _load(path: Path, key: str) -> Any:
    try:
        with path.open("rb") as stream:
            content = _ArraysOnly(stream, encoding="latin1").load()
        return content[key]
    except (
        OSError,
        EOFError,
        pickle.UnpicklingError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
    ) as failure:
        reason = f"no {failure}" if isinstance(failure, KeyError) else failure
        raise UserError(f"{path}: cannot be read ({reason}); accepted: a file of the CIFAR archive") from None
