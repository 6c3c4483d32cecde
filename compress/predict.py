"""Classifies image files with a model file and nothing else: classes, size and normalisation are in the file."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.data.image_file import ACCEPTED, accepted_pixels, image_files, read_square
from compress.data.normalisation import Normalisation
from compress.errors import UserError
from compress.export.formats import read_any
from compress.models.own_class import OwnNetwork

BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """The likeliest `classes` of the image in the file `path`, likeliest first, and their `probabilities` in 0..1."""

    path: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


class Predictor:
    """`model` (normalised images `(B, 3, H, W)` to logits) with the description of its file."""

    def __init__(self, model: Callable[[Tensor], Tensor], description: dict[str, Any]) -> None:
        self.model = model
        self.max_pixels = accepted_pixels()
        self.class_names = tuple(description["class_names"])
        self.size = int(description["input_shape"][-1])
        # One number stands for all three channels.
        statistics = (description[key] for key in ("mean", "standard_deviation"))
        mean, deviation = (values * 3 if len(values) == 1 else values for values in statistics)
        self.normalisation = Normalisation(mean, deviation, self.size)

    @classmethod
    def read(cls, path: str | Path, threads: int = 1, network: OwnNetwork | None = None) -> "Predictor":
        """The network in a file of any of the formats that `conf/export` names.

        threads: those that the runtime of the file may use; torch keeps its own number. network: one of the user's own
        class, or the class, where the file names one; a file can import nothing.
        Raises UserError, naming the file, where it is missing, damaged or foreign.
        """
        path = Path(path)
        model, description = read_any(path, threads, network)
        try:
            return cls(model, description)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path}: found a description without its classes or its input ({error})") from None

    def image(self, path: str | Path) -> Tensor:
        """The image in a file, of any size and mode, as the network takes it: float32 `(3, H, W)`, normalised.

        It is read, resized and cut to its centre as those in a folder of images are. Raises UserError where the file
        cannot be read as an image.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: found no such file; accepted: {ACCEPTED}")
        return self.normalisation(read_square(path, self.size, max_pixels=self.max_pixels)[None])[0]

    def __call__(self, paths: Sequence[str | Path], top: int = 1) -> list[Prediction]:
        """The `top` likeliest classes of each image file, in their order. Raises UserError as `image` does."""
        predictions = []
        for answer in self.answers(paths, top):
            if isinstance(answer, UserError):
                raise answer
            predictions.append(answer)
        return predictions

    def answers(self, paths: Sequence[str | Path], top: int = 1) -> Iterator[Prediction | UserError]:
        """As above, a batch at a time; in the place of an image that cannot be read comes the error that says why."""
        if not 1 <= top <= len(self.class_names):
            raise UserError(f"top: found {top}; accepted: 1 to {len(self.class_names)}, the number of classes")
        for start in range(0, len(paths), BATCH):
            read = [self._image_or_error(path) for path in paths[start : start + BATCH]]
            images = [image for image in read if isinstance(image, Tensor)]
            ranked = iter(self.ranked(torch.stack(images), top) if images else ())
            for path, image in zip(paths[start : start + BATCH], read, strict=True):
                yield Prediction(str(path), *next(ranked)) if isinstance(image, Tensor) else image

    def ranked(self, images: Tensor, top: int) -> Iterator[tuple[tuple[str, ...], tuple[float, ...]]]:
        """The `top` likeliest classes of each of the normalised `images` `(B, 3, H, W)`, and probabilities in 0..1.

        Raises UserError for a network whose logits are not a finite number for each class.
        """
        with torch.inference_mode():
            logits = self.model(images).float()
        if logits.shape != (len(images), len(self.class_names)) or not logits.isfinite().all():
            raise UserError(
                f"the network gives logits of the shape {tuple(logits.shape[1:])} that are "
                f"{'finite' if logits.isfinite().all() else 'no numbers'}; accepted: a finite one for each of its "
                f"{len(self.class_names)} classes"
            )
        best = logits.softmax(1).topk(top, dim=1)
        for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            yield tuple(self.class_names[index] for index in indices), tuple(values)

    def _image_or_error(self, path: str | Path) -> Tensor | UserError:
        try:
            return self.image(path)
        except UserError as mistake:
            return mistake


def pictures(paths: Sequence[str | Path]) -> list[Path]:
    """The image files that `paths` name: a file stands for itself, a folder for all in it, at every depth.

    Raises UserError for a folder without any.
    """
    files = []
    for path in map(Path, paths):
        inside = image_files(path) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"{path}: holds no image; accepted: {ACCEPTED}")
        files += inside
    return files
