"""A folder of images of any size: `train/CLASS/*`, `test/CLASS/*` and, if there is one, `val/CLASS/*`."""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from compress.data.class_names import class_names as names_of
from compress.data.file_module import FileModule
from compress.data.image_file import ACCEPTED, image_files
from compress.data.source import Source
from compress.data.undecoded import ImageFiles
from compress.errors import UserError

# ImageNet's, which most published weights expect; data.mean and data.standard_deviation replace them.
MEAN, STANDARD_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Folder(FileModule):
    """`data=folder data.root=DIRECTORY`: images become RGB, the shorter side `image_size`, cropped to the centre.

    class_names: a file with the names of the class folders in the order of a network's outputs, or a list of them;
    null: sorted.
    """

    def __init__(
        self,
        root: Annotated[str, Field(min_length=1)],
        class_names: str | list[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root = Path(root).expanduser()
        self.given_names = None if class_names is None else names_of(class_names)

    def prepare_data(self) -> None:
        if self.splits:
            return  # Lightning asks again, and listing a million files takes a while
        if not self.root.is_dir():
            raise UserError(
                f"data.root: found no folder {self.root.resolve()}; accepted: one that holds train/ and test/, or "
                "pictures alone to quantize with"
            )
        classes = self._classes("train")
        if len(classes) < 2:
            raise UserError(
                f"data.root: found {', '.join(classes) or 'no class'} in {self.root / 'train'}; accepted: a folder for "
                "each class, at least 2"
            )
        for split in ("test", "val"):
            if split == "val" and not (self.root / split).exists():
                continue
            if (others := self._classes(split)) != classes:
                different = ", ".join(sorted(set(others) ^ set(classes)))
                raise UserError(
                    f"data.root: train and {split} differ in {different}; accepted: the same classes in both"
                )
        if self.given_names is not None and set(self.given_names) != set(classes):
            different = ", ".join(sorted(set(self.given_names) ^ set(classes))[:5])
            raise UserError(
                f"data.class_names: the names and the folders in {self.root / 'train'} differ in {different}; "
                "accepted: the names of these folders"
            )
        for split, files in self._files.items():
            for name, paths in files.items():
                if not paths:
                    raise UserError(f"data.root: {self.root / split / name} holds no image; accepted: {ACCEPTED}")

    def read(self) -> Source:
        splits = {split: self._split(files) for split, files in self._files.items()}
        names = tuple(self._files["train"])
        del self._files
        return Source(*splits["train"], *splits["test"], names, MEAN, STANDARD_DEVIATION, splits.get("val"))

    @cached_property
    def _files(self) -> dict[str, dict[str, list[Path]]]:
        """The images of each class, in the order of the labels, of each split that there is."""
        names = self.given_names or self._classes("train")
        splits = [split for split in ("train", "val", "test") if (self.root / split).is_dir()]
        return {split: {name: image_files(self.root / split / name) for name in names} for split in splits}

    def _classes(self, split: str) -> list[str]:
        folder = self.root / split
        if not folder.is_dir():
            raise UserError(f"data.root: found no folder {folder}; accepted: a folder that holds train/ and test/")
        return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))

    def _split(self, files: dict[str, list[Path]]) -> tuple[ImageFiles, Tensor]:
        labels = torch.arange(len(files)).repeat_interleave(torch.tensor([len(paths) for paths in files.values()]))
        return ImageFiles([path for paths in files.values() for path in paths], self.max_pixels), labels
