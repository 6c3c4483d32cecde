"""Carrying the calibration images through the analog and the quantized network together, node by node.

Every value is computed once for all images and freed after its last reader, so the walk costs two forward passes in
all, whatever the depth, and each layer sees the inputs that the already quantized layers before it produce.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from compress.errors import UserError, first_line
from compress.models.canonical import LAYERS, Layer

# Images carried at once; the calibration set is re-cut to it, so that results do not depend on how it came.
BATCH = 128
# A batch is a tensor (B, ...) or a sequence that begins with one, as a DataLoader's (images, labels) does.
CalibrationBatches = Iterable[Tensor | Sequence[Any]]


def gather(batches: CalibrationBatches, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The calibration images, re-cut into batches of BATCH and copied, so that in-place layers spare the caller's.

    Raises UserError where there are no images.
    """
    images = [batch if isinstance(batch, Tensor) else batch[0] for batch in batches]
    images = [batch.detach().to(device=device, dtype=dtype) for batch in images if len(batch)]
    if not images:
        raise UserError("calibration images: found none; accepted: at least 1")
    if len({batch.shape[1:] for batch in images}) > 1:
        shapes = sorted({str(tuple(batch.shape[1:])) for batch in images})
        raise UserError(f"calibration images: found shapes {', '.join(shapes)}; accepted: one shape")
    return [part.clone() for part in torch.cat(images).split(BATCH)]


def walk(
    analog: nn.Module,
    quantized: nn.Module,
    graph: Graph,
    batches: list[Tensor],
    layers: list[str],
    solve: Callable[[str, list[Tensor], list[Tensor]], None],
    apart: bool = False,
) -> dict[str, float]:
    """Relative output error of each of `layers`, having called `solve` for each in execution order.

    A layer that is neither a convolution nor linear has no error. `graph` is that of the canonical network `analog` and
    of its copy `quantized`. `solve(name, quantized_inputs, analog_inputs)` gives the layer of `quantized` its
    new weight and bias; the inputs are lists of one tensor per batch, and the same list while nothing has been
    quantized, unless the networks are `apart`: different before the first of the layers, too. The error is
    |Y~ - Y| / |Y - b| over all outputs of the layer. The walk ends after the last layer. Raises UserError, naming the
    operation, where one fails.
    """
    last_reader = _last_readers(graph)
    remaining = set(layers)
    analog_values: dict[Node, list[Any]] = {}
    quantized_values: dict[Node, list[Any]] = {} if apart else analog_values
    errors = {}
    with torch.no_grad():
        for node in graph.nodes:
            if not remaining or node.op == "output":
                break
            if node.op == "call_module" and node.target in remaining:
                remaining.remove(node.target)
                source = node.args[0] if node.args else node.kwargs["input"]
                # First, so that inputs which do not fit the layer raise the error of its float copy.
                outputs = _evaluate(node, analog, analog_values, batches)
                solve(node.target, quantized_values[source], analog_values[source])
                changed = _evaluate(node, quantized, quantized_values, batches)
                layer = analog.get_submodule(node.target)
                if isinstance(layer, LAYERS):
                    errors[node.target] = _relative_error(layer, changed, outputs)
                _free(last_reader.get(node, ()), analog_values, quantized_values)
                if quantized_values is analog_values:
                    # From here on an in-place operation must not reach the other network's values. Copied in one go,
                    # so that values that share memory still do.
                    copied = copy.deepcopy(list(analog_values.values()))
                    quantized_values = dict(zip(analog_values, copied, strict=True))
                analog_values[node], quantized_values[node] = outputs, changed
                continue
            results = _evaluate(node, analog, analog_values, batches)
            if quantized_values is not analog_values:
                quantized_values[node] = _evaluate(node, quantized, quantized_values, batches)
            analog_values[node] = results
            _free(last_reader.get(node, ()), analog_values, quantized_values)
    return errors


@torch.no_grad()
def repeated_inputs(
    network: nn.Module, batches: list[Tensor], layers: Mapping[str, Iterable[str]]
) -> dict[str, list[Tensor]]:
    """What each of `layers` multiplies in `network` after its first call, and what the layers with its weight do.

    `layers` has for each layer the names of those that share its weight. Of these, only the ones that read their inputs
    as the layer does count. A layer that is called once and shares its weight with none is left out.
    """
    inputs: dict[str, list[Tensor]] = {}
    handles = []
    for name, others in layers.items():
        layer = network.get_submodule(name)
        alike = [layer, *(other for other in map(network.get_submodule, others) if _reads_alike(layer, other))]

        def keep(module: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
            inputs.setdefault(name, []).append(arguments[0].clone())

        handles += [module.register_forward_pre_hook(keep) for module in alike]
    repeated: dict[str, list[Tensor]] = {}
    try:
        for batch in batches:
            network(batch.clone())
            for name, tensors in inputs.items():
                repeated.setdefault(name, []).extend(tensors[1:])
            inputs.clear()
    finally:
        for handle in handles:
            handle.remove()
    return {name: tensors for name, tensors in repeated.items() if tensors}


def _reads_alike(layer: nn.Module, other: nn.Module) -> bool:
    options = ("stride", "padding", "dilation", "groups", "padding_mode")
    return all(getattr(layer, option, None) == getattr(other, option, None) for option in options)


def _last_readers(graph: Graph) -> dict[Node, list[Node]]:
    """For each node, the nodes whose values nobody reads after it (itself, where nobody reads it at all)."""
    last = {}
    for node in graph.nodes:
        last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    freed: dict[Node, list[Node]] = {}
    for source, reader in last.items():
        freed.setdefault(reader, []).append(source)
    return freed


def _free(nodes: Iterable[Node], *environments: dict[Node, list[Any]]) -> None:
    for environment in environments:
        for node in nodes:
            environment.pop(node, None)


def _evaluate(node: Node, model: nn.Module, values: dict[Node, list[Any]], batches: list[Tensor]) -> list[Any]:
    """The values of `node`, one for each batch."""
    return [_evaluate_batch(node, model, values, index, batch) for index, batch in enumerate(batches)]


def _evaluate_batch(node: Node, model: nn.Module, values: dict[Node, list[Any]], index: int, batch: Tensor) -> Any:
    if node.op == "placeholder":
        return batch.clone()  # an operation in place must not reach the next walk, or the other network
    if node.op == "get_attr":
        return attrgetter(str(node.target))(model)
    args, kwargs = map_arg((node.args, node.kwargs), lambda source: values[source][index])
    try:
        if node.op == "call_module":
            return model.get_submodule(str(node.target))(*args, **kwargs)
        if isinstance(node.target, str):  # a method
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)
    except Exception as error:
        reason = first_line(error)
        name = node.target if node.op == "call_module" else node.name
        raise UserError(f"{type(model).__name__}: {name} failed on the calibration images: {reason}") from error


def _relative_error(layer: Layer, changed: list[Tensor], outputs: list[Tensor]) -> float:
    """|changed - outputs| / |outputs - bias|, 0 where both are 0."""
    difference = energy = 0.0
    for new, old in zip(changed, outputs, strict=True):
        difference += float((new - old).square().sum(dtype=torch.float64))
        if layer.bias is not None:
            old = old - layer.bias.reshape(-1, *[1] * (0 if isinstance(layer, nn.Linear) else layer.weight.dim() - 2))
        energy += float(old.square().sum(dtype=torch.float64))
    if difference == 0:
        return 0.0
    return (difference / energy) ** 0.5 if energy else float("inf")
