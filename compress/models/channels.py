"""Networks whose layers have fewer channels than the architecture they were built as.

What channel pruning has left is a mapping by layer: `[out, in, groups]` of a convolution, `[out, in]` of a linear
layer, `[features]` of a batch norm. It travels with checkpoints and model files, and is all that is needed to build
the network again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from compress.errors import UserError
from compress.models import own_class
from compress.models.catalogue import build, names_class

Channels = Mapping[str, Sequence[int]]
WIDTHS = {
    nn.Conv2d: ("out_channels", "in_channels", "groups"),
    nn.Linear: ("out_features", "in_features"),
    _BatchNorm: ("num_features",),
}


def channels(model: nn.Module) -> dict[str, list[int]]:
    """The channels of every convolution, linear layer and batch norm of `model`."""
    return {
        name: [getattr(module, attribute) for attribute in attributes]
        for name, module in model.named_modules()
        if (attributes := _attributes(module)) is not None
    }


def changed_channels(model: nn.Module, fresh: nn.Module) -> dict[str, list[int]]:
    """Those of `model` that are not what they are in `fresh`, a network of the same architecture."""
    original = channels(fresh)
    return {name: widths for name, widths in channels(model).items() if widths != original.get(name)}


def with_channels(model: nn.Module, wanted: Channels) -> nn.Module:
    """`model` itself with fresh, unset weights in the layers of `wanted`, which get these channels.

    Raises UserError for a layer that is not there, and for channels that it cannot have.
    """
    for name, widths in wanted.items():
        module = dict(model.named_modules()).get(name)
        attributes = _attributes(module)
        if module is None or attributes is None or len(attributes) != len(widths):
            raise UserError(f"channels: found {list(widths)} for {name}; accepted: those of a layer of the network")
        most = [getattr(module, attribute) for attribute in attributes]
        if not all(type(width) is int and 1 <= width <= limit for width, limit in zip(widths, most, strict=True)):
            raise UserError(f"channels: found {list(widths)} for {name}; accepted: from 1 to {most}")
        if isinstance(module, nn.Conv2d) and (widths[0] % widths[2] or widths[1] % widths[2]):
            raise UserError(f"channels: found {list(widths)} for {name}; accepted: those that the groups divide")
        for attribute, width in zip(attributes, widths, strict=True):
            setattr(module, attribute, width)
        _resize(module)
    return model


def last_linear(model: nn.Module) -> str | None:
    """The name of the last linear layer, which is the classifier; None where there is no linear layer."""
    return next((name for name, layer in reversed([*model.named_modules()]) if isinstance(layer, nn.Linear)), None)


def architecture(
    node: Mapping[str, Any], num_classes: int, network: nn.Module, fresh: nn.Module | None = None
) -> dict[str, Any]:
    """What a model file says so that `rebuild` gives `network`, that of a config `node`, perhaps pruned.

    `fresh` is an unpruned network of the same node; without one, it is built.
    """
    options = {
        name: value
        for name, value in node.items()
        if name not in ("stem", "_target_", "checkpoint", "pretrained", "head")
    }
    described = {"stem": node["stem"], "options": options, "num_classes": num_classes}
    if fresh is None:
        with torch.random.fork_rng(devices=[]):
            fresh = build(node["stem"], num_classes, **options)
    changed = changed_channels(network, fresh)
    return described | ({"channels": changed} if changed else {})


def rebuild(architecture: Mapping[str, Any], network: own_class.OwnNetwork | None = None) -> nn.Module:
    """The network that {"stem", "options", "num_classes"} and perhaps "channels" describe, with weights of no meaning.

    `network`, of the user's own class, takes the place of the stem: a copy of it counts, or what it makes if it is a
    class. Raises UserError where the description names such a class and there is none: it may come from a file.
    """
    classes, options = architecture["num_classes"], architecture["options"]
    own_class.refuse_targets(options)
    if isinstance(network, nn.Module):
        model = own_class.adapted(own_class.given(network), classes)
    elif network is not None:
        model = own_class.adapted(own_class.make(network, classes, options.get("arguments") or {}), classes)
    elif names_class(architecture["stem"]):
        raise UserError(
            f"found a network of the class {str(options.get('target'))!r}, and no file may name code to run; accepted: "
            "network=MyNet() from Python or network=mynet.MyNet on the command line, with that class"
        )
    else:
        model = build(architecture["stem"], classes, **options)
    return with_channels(model, architecture.get("channels", {}))


def _attributes(module: nn.Module | None) -> tuple[str, ...] | None:
    if module is None or (parametrize.is_parametrized(module) and isinstance(module, _BatchNorm)):
        return None
    return next((attributes for kind, attributes in WIDTHS.items() if isinstance(module, kind)), None)


def _resize(module: nn.Module) -> None:
    """Gives the parameters and running statistics the shapes that the module's attributes ask for."""
    shapes: dict[str, tuple[int, ...]] = {}
    if isinstance(module, nn.Conv2d):
        shapes = {
            "weight": (module.out_channels, module.in_channels // module.groups, *module.kernel_size),
            "bias": (module.out_channels,),
        }
    elif isinstance(module, nn.Linear):
        shapes = {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
    elif isinstance(module, _BatchNorm):
        names = ("weight", "bias", "running_mean", "running_var")
        shapes = dict.fromkeys(names, (module.num_features,))
    for name, shape in shapes.items():
        value = getattr(module, name)
        if value is None:
            continue
        # The first numbers of what was there, and not uninitialised ones, so that building stays deterministic.
        part = value.detach()[tuple(slice(size) for size in shape)].clone(memory_format=torch.contiguous_format)
        if isinstance(value, nn.Parameter):
            setattr(module, name, nn.Parameter(part, requires_grad=value.requires_grad))
        else:
            setattr(module, name, part)
