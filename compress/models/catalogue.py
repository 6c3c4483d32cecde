"""Builds a network from the stem of its file in conf/model: adding an architecture is adding a file there."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from compress import paths, yaml_file
from compress.arguments import check_arguments
from compress.errors import UserError, first_line
from compress.models.own_class import STEM, adapted, own_network

# The option that says which network it is, by the stems that stand for any of many.
WHICH = {STEM: "target", "timm": "name", "torchvision": "name"}


def available() -> tuple[str, ...]:
    """The stems of conf/model and of the user's own folders, in alphabetical order."""
    return tuple(paths.options("model"))


def build(stem: str, num_classes: int, **options: Any) -> nn.Module:
    """The network described by conf/model/<stem>.yaml with freshly drawn weights: `(B, 3, H, W) -> (B, num_classes)`.

    `options` replace keys of that file. What is called is the `_target_` of the file, or a class that the options name:
    those of a downloaded model go through `compress.models.rebuild`, which refuses that. Of what the network returns
    only the logits count.

    Raises UserError for a stem without a file and for options that the file does not have or that are out of range.
    """
    target, values = _description(stem, options, "student/model", stem)
    return adapted(target(num_classes=num_classes, **values), num_classes)


def check_options(stem: str, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All arguments that `build` would pass, without `num_classes`; raises the same errors, naming `where`."""
    return _description(stem, options, where, where)[1]


def label(options: Mapping[str, Any]) -> str:
    """What a network with these `options`, its stem among them, is called: the stem, or which one of its many."""
    stem = options["stem"]
    return str(options[WHICH[stem]]) if stem in WHICH else stem


def names_class(stem: str) -> bool:
    """Whether the options of `stem` name a class that would be imported."""
    return bool(described(stem, "student/model")["_target_"] == f"{own_network.__module__}.{own_network.__name__}")


def described(stem: str, where: str) -> dict[str, Any]:
    """What `student=<stem>` composes: the keys of conf/model/<stem>.yaml and the stem; `where` is for the error."""
    file = paths.option_file("model", stem) if stem in available() else None
    if file is None:
        raise UserError(f"{where}: found {stem!r}; accepted: {', '.join(available())}{paths.of_the_user()}")
    yaml_file.check_file(file)
    keys: Any = OmegaConf.to_container(OmegaConf.load(file))
    if not isinstance(keys, dict) or not isinstance(keys.get("_target_"), str) or "defaults" in keys:
        found = ", ".join(map(str, keys)) if isinstance(keys, dict) else f"{keys!r}"
        raise UserError(
            f"{file}: found {found}; accepted: _target_, the name of a class or function, and its arguments"
        )
    return {**keys, "stem": stem}


def _description(
    stem: str, options: Mapping[str, Any], where_stem: str, where_options: str
) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    keys = described(stem, where_stem)
    target_name = keys.pop("_target_")
    module, _, name = target_name.rpartition(".")
    try:
        target = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as failure:
        raise UserError(
            f"{where_stem}: found {stem!r}, whose _target_ {target_name!r} cannot be imported ({first_line(failure)}); "
            "accepted: a class or function that is installed or lies in the working directory"
        ) from failure
    keys.pop("stem")
    options = {name: value for name, value in options.items() if name != "_target_"}
    return target, check_arguments(target, keys | options, where_options, accepted=tuple(keys))
