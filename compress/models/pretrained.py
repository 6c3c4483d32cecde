"""Weights that are published under a name, of the networks in `conf/model` that have such."""

from collections.abc import Callable, Mapping
from typing import Any

from compress.errors import UserError
from compress.models import timm_weights, torchvision_model
from compress.models.published import Published

# By the stem of the file in conf/model.
LISTS: Mapping[str, Callable[[str, bool | str], Published]] = {
    "timm": timm_weights.published,
    "torchvision": torchvision_model.published,
}


def published(options: Mapping[str, Any], weights: bool | str, where: str) -> Published:
    """The weights that `weights` names for the network with these `options`, its stem among them; true: the usual.

    Raises UserError, naming the key `where`, for a network without such weights.
    """
    known = LISTS.get(options["stem"])
    if known is None:
        stem = options["stem"]
        raise UserError(f"{where}: found {weights} for {stem}; accepted: false, or a network of {' or '.join(LISTS)}")
    try:
        return known(options["name"], weights)
    except UserError as mistake:
        raise UserError(f"{where}: {mistake}") from mistake
