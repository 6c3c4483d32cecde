"""The data of one process: what several runs use is read once."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from compress.arguments import arguments_of, build
from compress.data.module import DataModule
from compress.data.source import Images

MAX_DATA_SETS = 2  # data sets held in memory


class DataSets:
    """Makes data modules; those that differ in nothing but how batches are made share the images that one has read.

    The images of the two data sets that were used last are held, and what was rehearsed on them is remembered. A
    pickled copy holds none: a launcher sends what it runs to other processes.
    """

    def __init__(self) -> None:
        self._images: dict[str, Images] = {}
        self.rehearsed: set[str] = set()

    def __reduce__(self) -> tuple[type["DataSets"], tuple[()]]:
        return type(self), ()

    def clear(self) -> None:
        """Frees the images, before other processes need the memory; they are read again where they are asked for."""
        self._images.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def module(
        self,
        node: Mapping[str, Any],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        batch_size: int | None = None,
    ) -> DataModule:
        """The data module of a `data` node of the configuration, set up on `device`; downloads what is missing.

        `batch_size` replaces that of the node. Raises UserError for data that cannot be read.
        """
        replaced = {} if batch_size is None else {"batch_size": batch_size}
        data: DataModule = build({**node, **replaced}, "data", seed=seed, device=device)
        image_options = data.image_options(arguments_of(node))
        key = json.dumps([node["_target_"], image_options, str(device)], sort_keys=True)
        images = self._images.pop(key, None)
        if images is None:
            while len(self._images) >= MAX_DATA_SETS:
                del self._images[next(iter(self._images))]
            data.prepare_data()
            images = data.load()
        self._images[key] = images  # at the end, as the one used last
        data.set_images(images)
        return data
