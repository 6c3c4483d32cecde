"""A folder of images of any size: `train/CLASS/*`, `test/CLASS/*` and, if there is one, `val/CLASS/*`."""

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from compress.data.image_file import ACCEPTED, image_files, read_square
from compress.data.module import DataModule
from compress.data.source import Source
from compress.errors import UserError

# ImageNet's, which most published weights expect; data.mean and data.standard_deviation replace them.
MEAN, STANDARD_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Folder(DataModule):
    """`data=folder data.root=DIRECTORY`: images become RGB, the shorter side `image_size`, cropped to the centre."""

    def __init__(self, root: Annotated[str, Field(min_length=1)], **options: Any) -> None:
        super().__init__(**options)
        self.root = Path(root).expanduser()

    def prepare_data(self) -> None:
        if not self.root.is_dir():
            raise UserError(
                f"data.root: found no folder {self.root.resolve()}; accepted: one that holds train/ and test/"
            )
        classes = self._classes("train")
        if len(classes) < 2:
            raise UserError(f"data.root: {self.root / 'train'} holds {len(classes)} classes; accepted: at least 2")
        for split in ("test", "val"):
            if split == "val" and not (self.root / split).exists():
                continue
            if (others := self._classes(split)) != classes:
                different = ", ".join(sorted(set(others) ^ set(classes)))
                raise UserError(
                    f"data.root: train and {split} differ in {different}; accepted: the same classes in both"
                )
        for split in self._splits():
            for name in classes:
                if not self._files(split, name):
                    raise UserError(f"data.root: {self.root / split / name} holds no image; accepted: {ACCEPTED}")

    def read(self) -> Source:
        classes = self._classes("train")
        splits = {split: self._split(split, classes) for split in self._splits()}
        validation = splits.get("val", (None, None))
        return Source(*splits["train"], *splits["test"], tuple(classes), MEAN, STANDARD_DEVIATION, *validation)

    def _splits(self) -> list[str]:
        return [split for split in ("train", "val", "test") if (self.root / split).is_dir()]

    def _classes(self, split: str) -> list[str]:
        folder = self.root / split
        if not folder.is_dir():
            raise UserError(f"data.root: found no folder {folder}; accepted: a folder that holds train/ and test/")
        return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))

    def _files(self, split: str, name: str) -> list[Path]:
        return image_files(self.root / split / name)

    def _split(self, split: str, classes: list[str]) -> tuple[Tensor, Tensor]:
        files = [(path, label) for label, name in enumerate(classes) for path in self._files(split, name)]
        images = torch.empty(len(files), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for index, (path, _) in enumerate(files):
            images[index] = read_square(path, self.image_size)
        return images, torch.tensor([label for _, label in files])
