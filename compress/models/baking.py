"""Copies of networks, and weights that are computed in every forward made plain parameters."""

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm


def copied(network: nn.Module) -> nn.Module:
    """A deep copy of `network`, also where a hook has left a computed weight in it, which torch refuses to copy."""
    computed = [
        value
        for module in network.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(network, {id(value): value.detach().clone() for value in computed})


@torch.no_grad()
def bake(network: nn.Module) -> nn.Module:
    """Turns every computed weight of `network` itself into a parameter of the value that it has; returns `network`.

    Computed are parametrized tensors and those of torch's hooks: weight_norm, spectral_norm and pruning masks.
    """
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            bake_parametrizations(module)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
    return network


@torch.no_grad()
def bake_parametrizations(module: nn.Module, original: bool = False) -> None:
    """Gives a parametrized `module` plain parameters of the values that it has, or with `original` is computed from.

    torch's own remove_parametrizations deletes the property from a class that a deep copy shares with its original,
    which would take the weight away from the original too.
    """
    plain_type = parametrize.type_before_parametrizations(module)
    values = {
        name: cast(Tensor, parametrizations.original if original else getattr(module, name)).detach().clone()
        for name, parametrizations in cast(nn.ModuleDict, module.parametrizations).items()
    }
    del module.parametrizations
    module.__class__ = plain_type
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))
