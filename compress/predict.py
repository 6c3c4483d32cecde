"""Classifies image files with a model file and nothing else: classes, size and normalisation are in the file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.data.image_file import centred, read_rgb
from compress.data.normalisation import Normalisation
from compress.data.source import resized_rgb
from compress.errors import UserError
from compress.export.formats import exporter_of

BATCH = 64
ACCEPTED = "an image such as a .png or .jpg"


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
        self.class_names = tuple(description["class_names"])
        self.size = int(description["input_shape"][-1])
        # One number stands for all three channels.
        statistics = (description[key] for key in ("mean", "standard_deviation"))
        mean, deviation = (values * 3 if len(values) == 1 else values for values in statistics)
        self.normalisation = Normalisation(mean, deviation, self.size)

    @classmethod
    def read(cls, path: str | Path, threads: int = 1) -> "Predictor":
        """The network in a file of any of the formats that `conf/export` names.

        threads: those that the runtime of the file may use; torch keeps its own number.
        Raises UserError, naming the file, where it is missing, damaged or foreign.
        """
        path = Path(path)
        model, description = exporter_of(path).read(path, threads)
        try:
            return cls(model, description)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path}: found a description without its classes or its input ({error})") from None

    def image(self, path: str | Path) -> Tensor:
        """The image in a file, of any size and mode, as the network takes it: float32 `(3, H, W)`, normalised.

        A square image is resized as the images of a data set are; of any other the centre is cut out, as in a folder of
        images. Raises UserError where the file cannot be read as an image.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: found no such file; accepted: {ACCEPTED}")
        image = read_rgb(path, ACCEPTED)
        if image.width != image.height:
            image = centred(image, self.size)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        return self.normalisation(resized_rgb(pixels[None], self.size))[0]

    def __call__(self, paths: Sequence[str | Path], top: int = 1) -> list[Prediction]:
        """The `top` likeliest classes of each image file, in their order. Raises UserError as `image` does."""
        if not 1 <= top <= len(self.class_names):
            raise UserError(f"top: found {top}; accepted: 1 to {len(self.class_names)}, the number of classes")
        predictions = []
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            images = torch.stack([self.image(path) for path in batch])
            with torch.inference_mode():
                best = self.model(images).float().softmax(1).topk(top, dim=1)
            for path, values, indices in zip(batch, best.values.tolist(), best.indices.tolist(), strict=True):
                classes = tuple(self.class_names[index] for index in indices)
                predictions.append(Prediction(str(path), classes, tuple(values)))
        return predictions
