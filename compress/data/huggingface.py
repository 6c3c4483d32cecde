"""Data sets of Hugging Face's library `datasets`: parquet files, folders of images with metadata, names on the hub."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.data.file_module import FileModule
from compress.data.folder import MEAN, STANDARD_DEVIATION
from compress.data.image_file import read_square
from compress.data.source import Source
from compress.data.undecoded import Undecoded
from compress.errors import UserError, first_line

VALIDATION = ("validation", "valid", "val", "dev")  # what the split is called
IMAGE, LABEL = ("image", "img", "picture"), ("label", "labels", "class")  # columns, where their types do not tell


class HuggingFace(FileModule):
    """`data=huggingface`: `name` is one on the hub, with its `subset` if it has some, `root` a local folder instead.

    Columns and splits that are not given are found: the column of images and that of classes by their types or else
    their names; the split `test`, or if there is none that for validation, for testing, the other one for validation.
    """

    def __init__(
        self,
        name: str | None = None,
        root: str | None = None,
        subset: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if (name is None) == (root is None):
            found = "neither data.name nor" if name is None else "both data.name and"
            raise UserError(f"data: found {found} data.root; accepted: a name on the hub or a folder")
        self.root = None if root is None else Path(root).expanduser()
        self.name = self.hub_name = name
        self.subset = subset
        self.where = f"data.name: {name}" if root is None else f"data.root: {self.root}"
        self.train_split = train_split
        self.columns = {"image_column": image_column, "label_column": label_column}
        self.chosen = {"train_split": train_split, "validation_split": validation_split, "test_split": test_split}
        self._loaded: Mapping[str, Any] | None = None

    def prepare_data(self) -> None:
        if not self.splits and self._loaded is None:
            self._loaded = self._load()

    def _load(self) -> Mapping[str, Any]:
        """The splits by their names."""
        try:
            import datasets
        except ImportError:
            raise UserError(
                "data: found huggingface, but datasets is not installed; pip install 'compress[huggingface]'"
            ) from None
        # What it logs of a file that it cannot read is said by the exception, too.
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        if self.root is not None and not self.root.is_dir():
            raise UserError(f"data.root: found no folder {self.root.resolve()}; accepted: one that datasets reads")
        try:
            loaded: Mapping[str, Any]
            if self.root is None:
                loaded = datasets.load_dataset(self.name, self.subset)
            elif (self.root / "dataset_dict.json").is_file():
                loaded = datasets.load_from_disk(str(self.root))
            else:
                loaded = datasets.load_dataset(str(self.root.resolve()), self.subset)
        except Exception as failure:  # of the hub, of pyarrow, of a reader of files
            raise UserError(
                f"{self.where} cannot be read ({first_line(failure)}); accepted: parquet files, a folder of images, "
                "what datasets has saved, or a name on the hub"
            ) from None
        return loaded

    def read(self) -> Source:
        loaded, self._loaded = self._loaded or self._load(), None
        train, validation, test = self._chosen_splits(list(loaded))
        features = loaded[train].features
        image = self._column("image_column", features, "Image", IMAGE)
        label = self._column("label_column", features, "ClassLabel", LABEL)
        names, values = self._classes(loaded[train], label)
        place = {value: index for index, value in enumerate(values)}

        def split(name: str) -> tuple[Rows, Tensor]:
            given = list(loaded[name][label])
            unknown = next((value for value in given if value not in place), None)
            if unknown is not None or None in given:
                raise UserError(
                    f"{self.where} has in the split {name} the label {unknown!r}, which is no class of {train}; "
                    "accepted: another data.test_split or data.label_column"
                )
            rows = Rows(loaded[name], image, f"{self.name or self.root} {name}", self.max_pixels)
            return rows, torch.tensor([place[value] for value in given])

        held_out = None if validation is None else split(validation)
        return Source(*split(train), *split(test), names, MEAN, STANDARD_DEVIATION, held_out)

    def _chosen_splits(self, present: Sequence[str]) -> tuple[str, str | None, str]:
        """Those for training, validation and test."""
        for key, name in self.chosen.items():
            if name is not None and name not in present:
                raise UserError(f"data.{key}: found {name!r}, which {self.where} lacks; accepted: {', '.join(present)}")
        train, (_, validation, test) = self.train_split, self.chosen.values()
        others = [name for name in ("test", *VALIDATION) if name in present and name not in (train, validation, test)]
        if test is None and others:
            test = others.pop(0)
        if test is None or test in (train, validation) or validation == train:
            raise UserError(
                f"{self.where} has the splits {', '.join(present)}, of which no two are for training and test; "
                "accepted: data.train_split, data.validation_split and data.test_split that differ"
            )
        if validation is None:
            validation = next((name for name in others if name in VALIDATION), None)
        return train, validation, test

    def _column(self, key: str, features: Mapping[str, Any], kind: str, names: Sequence[str]) -> str:
        """The column given as `key`, or the only one of the type `kind`, or one of these `names`."""
        given = self.columns[key]
        if given is not None and given not in features:
            raise UserError(f"data.{key}: found {given!r}, which is no column; accepted: {', '.join(features)}")
        fitting = [name for name, feature in features.items() if type(feature).__name__ == kind]
        fitting = fitting or [name for name in names if name in features][:1]
        if given is None and len(fitting) != 1:
            raise UserError(
                f"data.{key}: found {' and '.join(fitting) or 'none by itself'}; accepted: one of {', '.join(features)}"
            )
        return given or fitting[0]

    def _classes(self, rows: Any, label: str) -> tuple[tuple[str, ...], list[Any]]:
        """The names of the classes and the values that stand for them."""
        names = getattr(rows.features[label], "names", None)
        values = list(range(len(names))) if names else sorted(set(rows[label]) - {None}, key=_numbers_first)
        if not all(isinstance(value, int | str) for value in values) or len(values) < 2:
            raise UserError(
                f"data.label_column: found {label!r} with {len(values)} different values; accepted: a column of at "
                f"least 2 classes among {', '.join(rows.features)}"
            )
        return tuple(map(str, names or values)), values


class Rows(Undecoded):
    """Images in the `column` of a data set whose file is mapped into memory; `where` says in messages what it is.

    max_pixels: see `accepted_pixels`.
    """

    def __init__(
        self, rows: Any, column: str, where: str, max_pixels: int | None = None, index: np.ndarray | None = None
    ) -> None:
        self._rows, self._column, self._where, self._max_pixels = rows, column, where, max_pixels
        if index is None:
            import datasets

            self._rows = rows.select_columns(column).cast_column(column, datasets.Image(decode=False))
        self._index = np.arange(len(rows)) if index is None else index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, indices: Tensor) -> "Rows":
        return Rows(self._rows, self._column, self._where, self._max_pixels, self._index[indices.numpy()])

    def read(self, index: int, size: int) -> Tensor:
        row = int(self._index[index])
        cell = self._rows[row][self._column]
        if cell is None:
            raise UserError(f"{self._where}, row {row}: found no image; accepted: one in every row")
        content = cell["bytes"]
        where = Path(cell["path"]) if content is None else Path(f"{self._where}, row {row}")
        return read_square(where, size, None if content is None else io.BytesIO(content), self._max_pixels)

    def identity(self) -> str:
        """Of the library's fingerprint and the rows."""
        return hashlib.sha256(f"{self._rows._fingerprint} ".encode() + self._index.tobytes()).hexdigest()


def _numbers_first(value: Any) -> tuple[bool, Any]:
    return isinstance(value, str), value
