"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 colour images of 32x32 pixels, in the files that torchvision uses.

Krizhevsky 2009. The batches are Python pickles; they are read by an unpickler that admits arrays and nothing else.
"""

import pickle
import tarfile
import tempfile
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
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
        self.root = Path(root).expanduser()
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
            # Beside its place and then renamed: an archive that breaks off must not leave half a data set behind.
            with tempfile.TemporaryDirectory(dir=self.root) as temporary, tarfile.open(archive) as opened:
                opened.extractall(temporary, filter="data")
                (Path(temporary) / self.published.base_folder).rename(self.folder)
        except (tarfile.TarError, OSError, EOFError) as failure:
            raise UserError(
                f"data.root: {archive} cannot be unpacked ({failure}); accepted: the whole archive"
            ) from None

    def read(self) -> Source:
        names = _load(self.folder / self.names_file).get(self.names_key, ())
        train, test = (self._batches(files, len(names)) for files in (self.train_files, self.test_files))
        return Source(*train, *test, tuple(names), self.mean_published, self.deviation_published)

    def _files(self) -> list[str]:
        return [*self.train_files, *self.test_files, self.names_file]

    def _batches(self, files: list[str], classes: int) -> tuple[Tensor, Tensor]:
        pixels, labels = [], []
        for name in files:
            content = _load(self.folder / name)
            data, target = getattr(content.get("data"), "values", None), content.get(self.labels_key)
            if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072:
                raise UserError(f"{self.folder / name}: its data are not rows of 3,072 bytes; accepted: a CIFAR batch")
            fits = isinstance(target, list) and len(target) == len(data)
            if not fits or not all(type(label) is int and 0 <= label < classes for label in target):
                raise UserError(
                    f"{self.folder / name}: its {self.labels_key} do not fit {len(data)} rows and the {classes} "
                    f"classes of {self.names_file}; accepted: a CIFAR batch"
                )
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


class _Bytes:
    """Stands in for numpy.dtype, and admits unsigned bytes alone."""

    def __init__(self, name: str, *_: Any) -> None:
        if name not in ("u1", "|u1"):
            raise pickle.UnpicklingError(f"its arrays are of {name!r}, not of bytes")

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment, which a byte has not."""


class _Array:
    """Stands in for numpy.ndarray, whose own `__setstate__` trusts what it is given and can crash on damaged files."""

    values = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, column_major, content = state
        # Python 2 wrote text where Python 3 has bytes.
        content = content.encode("latin1") if isinstance(content, str) else content
        if not isinstance(kind, _Bytes) or column_major not in (False, True):
            raise pickle.UnpicklingError("its arrays are not of bytes")
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order="F" if column_major else "C")


class _ArraysOnly(pickle.Unpickler):
    """Plain containers, text, numbers and arrays of bytes; anything else in the file is refused, not called."""

    allowed: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Bytes,
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
        # Where numpy keeps it depends on the version that wrote the file.
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
        ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array") from None


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            content = _ArraysOnly(stream, encoding="latin1").load()
    except Exception as failure:
        # A damaged pickle can fail in any way: as a codec that does not exist, or for want of memory.
        reason = str(failure) or type(failure).__name__
        raise UserError(f"{path}: cannot be read ({reason}); accepted: a file of the CIFAR archive") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not a mapping; accepted: a file of the CIFAR archive")
    return content
