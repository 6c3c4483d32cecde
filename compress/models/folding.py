"""Folding BatchNorm into the layer before it: w' = g w, b' = beta + g (b - mean), with g = gamma / sqrt(var + eps).

Jacob et al. 2018 (1712.05877), section 3.2. Which pairs may be folded is read off the graph of a canonical network, see
`compress.models.canonical`, and off the identity of parameters, not off names.
"""

from collections import Counter
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from compress.models.canonical import DIMENSIONS, LAYERS, canonical, layer_of


def find_foldable(network: GraphModule) -> list[tuple[str, str]]:
    """(layer, batch norm) names, in execution order, of every BatchNorm of a canonical network that folds exactly.

    The batch norm's only input is the output of a convolution or linear layer that nobody else reads, and it normalises
    the layer's channels by running statistics; both are called once, and no other layer has the layer's parameters.
    """
    calls = Counter(node.target for node in network.graph.nodes if node.op == "call_module")
    modules = {name: network.get_submodule(name) for name in calls}
    users = Counter(id(parameter) for module in modules.values() for parameter in module.parameters(recurse=False))
    pairs = []
    for node in network.graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], _BatchNorm):
            continue
        source = node.all_input_nodes[0]
        if source.op != "call_module" or len(source.users) != 1 or type(modules[source.target]) not in LAYERS:
            continue
        norm, layer = modules[node.target], layer_of(network, source.target)
        # Of (B, L, N), which a Linear may give, BatchNorm1d normalises L.
        channels = not isinstance(layer, nn.Linear) or source.meta[DIMENSIONS] == 2
        once = calls[node.target] == calls[source.target] == 1
        alone = all(users[id(parameter)] == 1 for parameter in layer.parameters(recurse=False))
        fits = norm.running_mean is not None and norm.num_features == layer.weight.shape[0]
        if channels and once and alone and fits:
            pairs.append((source.target, node.target))
    return pairs


@torch.no_grad()
def fold_pairs(network: nn.Module, pairs: Sequence[tuple[str, str]]) -> None:
    """Fold the named (layer, batch norm) pairs in `network` itself; each batch norm becomes nn.Identity.

    Computed in float64.
    """
    for layer_name, norm_name in pairs:
        layer, norm = layer_of(network, layer_name), batch_norm_of(network, norm_name)
        gain, mean = batch_norm_gain(norm), norm.get_buffer("running_mean").double()
        bias = -mean if layer.bias is None else layer.bias.double() - mean
        bias = bias * gain
        if norm.bias is not None:
            bias = bias + norm.bias.double()
        weight = layer.weight.double() * gain.reshape(-1, *[1] * (layer.weight.dim() - 1))
        dtype, trained = layer.weight.dtype, layer.weight.requires_grad
        layer.weight = nn.Parameter(weight.to(dtype), requires_grad=trained)
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=trained)
        network.set_submodule(norm_name, nn.Identity().eval())


def batch_norm_of(network: nn.Module, name: str) -> _BatchNorm:
    """The batch norm called `name`, one of those that `find_foldable` names."""
    return cast(_BatchNorm, network.get_submodule(name))


def batch_norm_gain(norm: _BatchNorm) -> Tensor:
    """The factor (N,), float64, by which a BatchNorm with running statistics multiplies each channel in eval mode."""
    gain = (norm.get_buffer("running_var").double() + norm.eps).rsqrt()
    return gain if norm.weight is None else gain * norm.weight.double()


def fold_batch_norm(model: nn.Module, input_shape: Sequence[int]) -> GraphModule:
    """A canonical copy of `model` for images (C, H, W), every foldable BatchNorm folded; `model` stays as it is.

    Raises UserError where the model cannot be traced.
    """
    network = canonical(model, input_shape)
    fold_pairs(network, find_foldable(network))
    return network
