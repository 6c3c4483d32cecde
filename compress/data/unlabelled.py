"""Pictures without labels, to calibrate a network on and to compare it with another."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from compress.data.draws import stratified_order
from compress.data.folder import MEAN, STANDARD_DEVIATION, Folder
from compress.data.image_file import ACCEPTED, image_files
from compress.data.source import Source, Split
from compress.data.undecoded import ImageFiles
from compress.errors import UserError


def has_labels(root: str | Path) -> bool:
    """Whether the folder `root` is one for `Folder`, and not one of mere pictures."""
    return any((Path(root).expanduser() / split).is_dir() for split in ("train", "test"))


class Unlabelled(Folder):
    """All pictures in `root` and below; `class_names` says what a network calls its outputs.

    A share of them, `validation_fraction`, at least one, is the validation and the test set; the others, or the only
    one, are for calibration. Every label is 0 until `label` gives them some.
    """

    labelled = False

    def prepare_data(self) -> None:
        if not self.root.is_dir():
            raise UserError(f"data.root: found no folder {self.root.resolve()}; accepted: a folder of pictures")
        if self.given_names is None:
            raise UserError(
                f"data.class_names: found none, and {self.root} has pictures without labels; accepted: a file with the "
                "names of the network's classes in its order, one a line or as a JSON list"
            )
        if not image_files(self.root):
            raise UserError(f"data.root: {self.root} holds no image; accepted: {ACCEPTED}")

    def read(self) -> Source:
        assert self.given_names is not None  # else `prepare_data` has refused
        pictures = ImageFiles(image_files(self.root), self.max_pixels)
        order = stratified_order(torch.zeros(len(pictures), dtype=torch.int64), self.split_seed)[: self.limit]
        count = max(1, round(self.validation_fraction * len(order)))
        compared, calibrated = order[:count].sort().values, order[count:].sort().values
        chosen = [pictures[part] for part in (calibrated if len(calibrated) else compared, compared)]
        train, test = ((images, torch.zeros(len(images), dtype=torch.int64)) for images in chosen)
        return Source(*train, *test, self.given_names, MEAN, STANDARD_DEVIATION, test)

    def label(self, network: Callable[[Tensor], Tensor]) -> None:
        """Makes the class that `network` finds the label of each picture that is for validation and test.

        The accuracy of another network is then the share of pictures that both put into the same class.
        """
        with torch.no_grad():
            labels = torch.cat([network(images).argmax(1) for images, _ in self.test_dataloader()])
        self.splits = self.splits | {name: Split(self.splits[name].images, labels) for name in ("validation", "test")}
