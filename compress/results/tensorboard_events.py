"""TensorBoard's event files in the run directory."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger

from compress.errors import UserError


class TensorBoardEvents(TensorBoardLogger):
    """Lightning's logger, which says before any work that its library is missing."""

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        if find_spec("tensorboard") is None:
            raise UserError("logger: found tensorboard, which is not installed; pip install 'compress[tensorboard]'")
