"""TensorBoard's event files in the run directory."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger

from compress.errors import UserError


class TensorBoardEvents(TensorBoardLogger):
    """Lightning's logger, which says before any work what is wrong: its library is missing, say."""

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        if find_spec("tensorboard") is None:
            raise UserError("logger: found tensorboard, which is not installed; pip install 'compress[tensorboard]'")
        for key in ("name", "version", "sub_dir"):
            place = Path(str(options.get(key) or ""))
            if place.is_absolute() or ".." in place.parts:
                raise UserError(
                    f"logger.tensorboard.{key}: found {str(place)!r}; accepted: a folder in the run directory"
                )
