"""Masks of pruned weights: every pruned layer has a boolean buffer `weight_mask`, False where its weight is zero.

A buffer is copied, moved, averaged, saved and loaded with its layer. Nothing reads it in the forward pass: after every
step of an optimizer the weights themselves are set to zero, so that code that writes or quantizes a network needs no
masks. A mask can drop further weights, but never takes one back.
"""

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.errors import UserError

MASK = "weight_mask"


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` whose weights may be pruned, by name in the order of definition."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear)
    }


def weight_of(layer: nn.Module) -> Tensor:
    """The parameter that is trained: of a fake-quantized layer the float weight, whose zeros stay zero on the grid."""
    if parametrize.is_parametrized(layer, "weight"):
        return layer.get_parameter("parametrizations.weight.original")
    return cast(Tensor, layer.weight)


def attach(model: nn.Module, names: Iterable[str]) -> None:
    """Gives every named layer without a mask one that keeps all weights."""
    for name in names:
        layer = model.get_submodule(name)
        if not hasattr(layer, MASK):
            layer.register_buffer(MASK, torch.ones_like(weight_of(layer), dtype=torch.bool))


def remove(model: nn.Module) -> None:
    """Takes all masks off; the weights stay zero until something trains them."""
    for name in masks_of(model):
        delattr(model.get_submodule(name), MASK)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks of `model` by the names of their layers, in the shapes of the weights."""
    return {name: getattr(layer, MASK) for name, layer in model.named_modules() if hasattr(layer, MASK)}


@torch.no_grad()
def narrow(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Drops, from the masks of the named layers, what these `masks` drop, and sets these weights to zero."""
    for name, mask in masks.items():
        getattr(model.get_submodule(name), MASK).logical_and_(mask)
    apply(model)


@torch.no_grad()
def apply(model: nn.Module) -> None:
    """Sets every weight to zero that a mask drops."""
    for layer in model.modules():
        if hasattr(layer, MASK):
            weight_of(layer).masked_fill_(~getattr(layer, MASK), 0)


def mask_zeros(model: nn.Module, names: Iterable[str]) -> None:
    """Masks the zeros of the named layers, which come from a file that holds no masks."""
    attach(model, names)
    narrow(model, {name: weight_of(model.get_submodule(name)) != 0 for name in names})


def restore(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Gives `model` the masks of a state dict, whose other entries are ignored, and applies them.

    Raises UserError, beginning with `where`, for a mask that fits no layer.
    """
    known = layers(model)
    masks = {name.removesuffix(f".{MASK}"): value for name, value in state.items() if is_mask(name)}
    for name, mask in masks.items():
        shape = tuple(weight_of(known[name]).shape) if name in known else None
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            wanted = "the mask of a layer" if shape is None else f"booleans {shape}"
            raise UserError(f"{where}: found {mask.dtype} {tuple(mask.shape)} as {name}.{MASK}; accepted: {wanted}")
    attach(model, masks)
    narrow(model, {name: mask.to(weight_of(known[name]).device) for name, mask in masks.items()})


def is_mask(name: str) -> bool:
    """Whether `name` in a state dict is that of a mask."""
    return name.rpartition(".")[2] == MASK


def counted(model: nn.Module) -> dict[str, dict[str, int]]:
    """By layer, the number of weights under a mask and how many of them it drops."""
    masks = masks_of(model).items()
    return {name: {"weights": mask.numel(), "pruned": mask.numel() - int(mask.sum())} for name, mask in masks}
