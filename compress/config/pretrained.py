"""`pretrained=true`: published weights become the checkpoint, and what they say of their images is taken over."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from compress.arguments import plain
from compress.errors import UserError
from compress.models.pretrained import published
from compress.models.published import Published

# The side in pixels of images of one's own, where nothing says another.
USUAL_SIZE = 32


def take_over(config: DictConfig) -> None:
    """Completes student and data by what the published weights of the student want, unless they say something else.

    The checkpoint, the architecture's name, and the size and the normalisation of images. Where the data have another
    size the network resizes its images.

    Raises UserError for weights that are not published or cannot be fetched.
    """
    data = config.data
    found = _completed(config.student, config.student, "student")
    if data.get("image_size", USUAL_SIZE) is None:
        data.image_size = found.size if found else USUAL_SIZE
    if found:
        _fill(data, found)
        _set_checkpoint(config.student, config.student, data, found, "student")


def class_names(role: Mapping[str, Any], model: Mapping[str, Any], where: str) -> list[str]:
    """What the classes of the published weights of a `role` are called; none, where it has none or they do not say."""
    weights = role.get("pretrained", False)
    return list(published(model, weights, f"{where}.pretrained").class_names) if weights else []


def take_over_teacher(config: DictConfig, key: str) -> None:
    """The same for the teacher at `key`: its own normalisation and size."""
    node = OmegaConf.select(config, key)
    found = _completed(node, node.model, key)
    if not found:
        return
    _fill(node, found)
    _set_checkpoint(node, node.model, config.data, found, key)


def _completed(role: DictConfig, model: Any, where: str) -> Published | None:
    weights = role.get("pretrained", False)
    if weights is False or not isinstance(model, DictConfig) or "stem" not in model:
        return None
    if weights is not True and not isinstance(weights, str):
        raise UserError(f"{where}.pretrained: found {weights!r}; accepted: true, false, or the name of weights")
    found = published(plain(model, resolve=False), weights, f"{where}.pretrained")
    model.update(found.options)
    role.pretrained = found.weights
    return found


def _set_checkpoint(role: DictConfig, model: DictConfig, data: DictConfig, found: Published, where: str) -> None:
    if model.input_size is None and (found.fixed or data.get("image_size") != found.size):
        model.input_size = found.size
    try:
        path = str(found.checkpoint(model.input_size))
    except UserError as mistake:
        raise UserError(f"{where}.pretrained: {mistake}") from mistake
    if role.checkpoint not in (None, path):
        raise UserError(
            f"{where}.pretrained: found {found.weights} beside {where}.checkpoint; accepted: one of the two"
        )
    role.checkpoint = path


def _fill(node: DictConfig, found: Published) -> None:
    with open_dict(node):
        for key in ("mean", "standard_deviation"):
            if node.get(key) is None:
                node[key] = list(getattr(found, key))
