"""Folding BatchNorm into the layer before it: w' = g w, b' = beta + g (b - mean), with g = gamma / sqrt(var + eps).

Jacob et al. 2018 (1712.05877), section 3.2. Which pairs may be folded is read off the torch.fx graph, not off names.
"""

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.fx import Graph, Tracer
from torch.nn.utils import parametrize

from compress.errors import UserError, first_line

FOLDABLE = {nn.BatchNorm2d: nn.Conv2d, nn.SyncBatchNorm: nn.Conv2d, nn.BatchNorm1d: nn.Linear}


def trace(model: nn.Module) -> Graph:
    """The torch.fx graph of `model` in eval mode; the modes of its modules stay as they are.

    Raises UserError, naming the model's class, where torch.fx cannot follow its forward.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return Tracer().trace(model)
    except Exception as error:
        reason = first_line(error)
        raise UserError(
            f"{type(model).__name__}: torch.fx cannot trace its forward ({reason}); "
            "a model to be quantized may not branch on the values of tensors"
        ) from error
    finally:
        for module in training:
            module.training = True


def find_foldable(model: nn.Module) -> list[tuple[str, str]]:
    """(layer, batch norm) names, in execution order, of every BatchNorm that can be folded exactly.

    The batch norm's only input is the output of a Conv2d (BatchNorm2d) or Linear (BatchNorm1d) that nobody else reads,
    both modules are called once, and running statistics exist. Raises UserError where the model cannot be traced.
    """
    graph = trace(model)
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or len(node.all_input_nodes) != 1:
            continue
        source = node.all_input_nodes[0]
        if source.op != "call_module" or len(source.users) != 1:
            continue
        norm, layer = modules[node.target], modules[source.target]
        layer_type = next((FOLDABLE[kind] for kind in FOLDABLE if isinstance(norm, kind)), None)
        if layer_type is None or not isinstance(layer, layer_type):
            continue
        once = calls[node.target] == 1 and calls[source.target] == 1
        if once and norm.running_mean is not None and norm.num_features == layer.weight.shape[0]:
            pairs.append((source.target, node.target))
    return pairs


@torch.no_grad()
def fold_pairs(model: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    """Fold the named (layer, batch norm) pairs in `model` itself, and return it; each batch norm becomes nn.Identity.

    Computed in float64. The layer gets new parameters, so one that shared its weight with another layer no longer does.
    """
    for layer_name, norm_name in pairs:
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        weight = layer.weight.double()
        gain = batch_norm_gain(norm)
        bias = -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
        bias = bias * gain
        if norm.bias is not None:
            bias = bias + norm.bias.double()
        weight = weight * gain.reshape(-1, *[1] * (weight.dim() - 1))
        dtype, trained = layer.weight.dtype, layer.weight.requires_grad
        layer.weight = nn.Parameter(weight.to(dtype), requires_grad=trained)
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=trained)
        parent, _, child = norm_name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity().eval())
    return model


def batch_norm_gain(norm: nn.Module) -> Tensor:
    """The factor (N,), float64, by which a BatchNorm with running statistics multiplies each channel in eval mode."""
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    return gain if norm.weight is None else gain * norm.weight.double()


@torch.no_grad()
def bake_parametrizations(model: nn.Module, original: bool = False) -> nn.Module:
    """Turn every parametrized tensor of `model` (a fake-quantized weight) into a plain parameter; return `model`.

    The parameter has the value that the parametrization gives, or with `original` the one that it is given.
    torch's own remove_parametrizations deletes the property from a class that a deep copy shares with its original,
    which would take the weight away from the original too.
    """
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            plain_type = parametrize.type_before_parametrizations(module)
            values = {
                name: (parametrizations.original if original else getattr(module, name)).detach().clone()
                for name, parametrizations in module.parametrizations.items()
            }
            del module.parametrizations
            module.__class__ = plain_type
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value))
    return model


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A deep copy of `model` in eval mode, every foldable BatchNorm folded (see `find_foldable`); `model` is untouched.

    Parametrized tensors become plain ones (see `bake_parametrizations`). Raises UserError where the model cannot be
    traced.
    """
    folded = bake_parametrizations(copy.deepcopy(model).eval())
    return fold_pairs(folded, find_foldable(folded))
