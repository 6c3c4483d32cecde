"""`pretrained=true`: what the weights that are published of a network say of its images is taken over."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from compress.config import ensemble
from compress.errors import UserError
from compress.models.pretrained import published
from compress.models.published import Published

# The side in pixels of images of one's own, where nothing says another.
USUAL_SIZE = 32


def take_over(config: DictConfig, typed: Collection[str]) -> None:
    """Completes `config` by what published weights that it names want, unless it says something else.

    The size and the normalisation of images, and the names of the architecture and of the weights. Where the data have
    another size, or images of one, the network resizes them. `typed` are the keys on the command line.

    Raises UserError for weights that are not published, or of which it cannot be found out what they want.
    """
    student, data = config.student, config.data
    found = _completed(student, student, "student")
    if "image_size" in data and data.image_size is None:
        data.image_size = found.size if found else USUAL_SIZE
    if found:
        if "data.image_size" not in typed:
            _resize(student, found, data)
        _normalise(data, found)
    for key in ensemble.keys(config):
        node = OmegaConf.select(config, key)
        found = _completed(node, node.model, key)
        if found:
            _resize(node.model, found, data)
            _normalise(node, found)


def _completed(role: DictConfig, model: DictConfig, where: str) -> Published | None:
    weights = role.get("pretrained", False)
    if weights is False or weights is None:
        return None
    if role.checkpoint is not None:
        raise UserError(f"{where}.pretrained: found {weights} beside {where}.checkpoint; accepted: one of the two")
    found = published(OmegaConf.to_container(model), weights, f"{where}.pretrained")
    model.update(found.options)
    role.pretrained = found.weights
    return found


def _resize(model: DictConfig, found: Published, data: DictConfig) -> None:
    if model.input_size is None and data.get("image_size") != found.size:
        model.input_size = found.size


def _normalise(node: DictConfig, found: Published) -> None:
    for key in ("mean", "standard_deviation"):
        if node.get(key) is None:
            node[key] = list(getattr(found, key))
