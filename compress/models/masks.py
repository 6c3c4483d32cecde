"""Masks of pruned weights: a boolean buffer `weight_mask` beside each weight, True where the weight is kept.

A buffer is copied, moved, averaged, saved and loaded with its layer. Nothing reads it in the forward pass: the weight
itself is set to zero, after each step of an optimizer, and so whoever writes or quantizes the network only needs that.
A mask may lose weights, it never gets one back.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.errors import UserError

MASK = "weight_mask"


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` whose weights may be pruned, by name in the order of definition."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def weight_of(layer: nn.Module) -> Tensor:
    """The parameter that is trained: behind a fake quantizer the float weight, which is zero where its value is."""
    if parametrize.is_parametrized(layer, "weight"):
        return layer.parametrizations.weight.original
    return layer.weight


def attach(model: nn.Module, names: Iterable[str]) -> None:
    """Gives each named layer a mask that keeps everything, unless it has a mask already."""
    for name in names:
        layer = model.get_submodule(name)
        if not hasattr(layer, MASK):
            layer.register_buffer(MASK, torch.ones_like(weight_of(layer), dtype=torch.bool))


def remove(model: nn.Module) -> None:
    """Takes all masks off; the weights stay zero until something trains them."""
    for name in found(model):
        delattr(model.get_submodule(name), MASK)


def found(model: nn.Module) -> dict[str, Tensor]:
    """The masks of `model` by the names of their layers, each in the shape of its weight."""
    return {name: getattr(layer, MASK) for name, layer in model.named_modules() if hasattr(layer, MASK)}


@torch.no_grad()
def narrow(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Takes from the masks of the named layers what `kept` does not keep, and sets these weights to zero."""
    for name, mask in kept.items():
        getattr(model.get_submodule(name), MASK).logical_and_(mask)
    apply(model)


@torch.no_grad()
def apply(model: nn.Module) -> None:
    """Sets every weight that a mask does not keep to zero, whatever it is now."""
    for layer in model.modules():
        if hasattr(layer, MASK):
            weight_of(layer).masked_fill_(~getattr(layer, MASK), 0)


def mask_zeros(model: nn.Module, names: Iterable[str]) -> None:
    """Masks of the named layers that keep exactly what is not zero, as in a file that holds no masks."""
    attach(model, names)
    narrow(model, {name: weight_of(model.get_submodule(name)) != 0 for name in names})


def restore(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Gives `model` the masks of a state dict, whose other entries are passed over, and applies them.

    Raises UserError, beginning with `where`, for a mask that fits no layer.
    """
    known = layers(model)
    own = {name.removesuffix(f".{MASK}"): value for name, value in state.items() if is_mask(name)}
    for name, mask in own.items():
        shape = tuple(weight_of(known[name]).shape) if name in known else None
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            wanted = "the mask of a layer" if shape is None else f"booleans {shape}"
            raise UserError(f"{where}: found {mask.dtype} {tuple(mask.shape)} as {name}.{MASK}; accepted: {wanted}")
    attach(model, own)
    narrow(model, {name: mask.to(weight_of(known[name]).device) for name, mask in own.items()})


def is_mask(name: str) -> bool:
    """Whether `name` in a state dict is that of a mask."""
    return name.rpartition(".")[2] == MASK


def counted(model: nn.Module) -> dict[str, dict[str, int]]:
    """By layer, the number of weights under a mask and how many of them it does not keep."""
    return {
        name: {"weights": mask.numel(), "pruned": mask.numel() - int(mask.sum())} for name, mask in found(model).items()
    }
