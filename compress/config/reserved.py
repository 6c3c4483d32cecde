"""Words that are no arguments, `_target_` and `stem` among them, refused where nothing reads them."""

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from compress import models
from compress.errors import UserError
from compress.models import own_class

# Hydra reads these where it instantiates a node, which it never does here.
OF_HYDRA = ("_recursive_", "_convert_", "_args_")
TRAINER = "pytorch_lightning.Trainer"


def check_reserved(config: DictConfig) -> None:
    """Raises UserError for the first such word that would change nothing."""
    for path, node in _nodes(OmegaConf.to_container(config, resolve=True)):
        where, last = ".".join(path), path[-1]
        for word in OF_HYDRA:
            _refuse(word, node, where)
        if last != "optimizer":
            _refuse("_partial_", node, where)
        listed = last.endswith("]")
        untold = path == ("trainer",) and node.get("_target_") != TRAINER
        if listed or untold or path in (("teacher",), ("teacher", "training")):
            _refuse("_target_", node, where)
        if listed or (len(path) > 1 and last not in ("model", "optimizer", "scheduler")):
            _refuse("stem", node, where)


def check_target(node: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a `_target_` of a network that is not the one of its stem."""
    file = models.described(node["stem"], where)
    if node.get("_target_", file["_target_"]) != file["_target_"]:
        raise UserError(
            f"{where}._target_: found {node['_target_']!r}; accepted: a stem, {where}=STEM, or for a class of your own "
            f"{where}={own_class.STEM} {where}.target=MODULE.CLASS"
        )


def _refuse(word: str, node: Mapping[str, Any], where: str) -> None:
    if word in node:
        raise UserError(f"{where}.{word}: found {node[word]!r}, which nothing reads; accepted: no such key")


def _nodes(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Every mapping below `value` with its keys; what is passed to a class of the user's own is not looked into."""
    if isinstance(value, Mapping):
        if path:
            yield path, value
        own = value.get("stem") == own_class.STEM
        for key, one in value.items():
            if not (own and key == "arguments"):
                yield from _nodes(one, (*path, str(key)))
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from _nodes(one, (*path[:-1], f"{path[-1]}[{index}]"))
