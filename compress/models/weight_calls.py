"""Turns the functions of a graph that multiply a constant weight into modules of torch.nn.

Convolutions, linear maps, products with a matrix and batch norms count, whether their weight is a parameter or computed
from parameters alone, as a standardised weight is: the module gets the value. A transposed convolution becomes one of
zeros between the pixels.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from compress.models.transposed import spaced, spacing, turned

aten = torch.ops.aten
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}  # by the dimensions of the input
IN_PLACE = {name for name in dir(operator) if name.startswith("i") and f"__{name}__" in dir(operator)} | {"setitem"}


@dataclass(frozen=True)
class _Call:
    """A function's `source`, the tensors it reads beside that, its options, and the maker of the module for these.

    transposed: the options of a transposed convolution, see `spacing`; the module is called on its spaced input.
    """

    source: Any
    tensors: tuple[Any, ...]
    options: tuple[Any, ...]
    make: Callable[..., nn.Module]
    transposed: tuple[Any, ...] | None = None


def replace_weight_calls(module: GraphModule, values: dict[Node, Any]) -> GraphModule:
    """`module` with modules in place of the calls; `values` has what each of its nodes computes for some images.

    Modules take the name of their parameter's owner. A parameter that is the weight as it is stays the same object, so
    tied weights stay tied. What reads the weight of a module in another way gets a copy of it.
    """
    graph = module.graph
    constant = _constants(graph)
    made: dict[str, str] = {}
    called = {node.target for node in graph.nodes if node.op == "call_module"}
    new: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        call = _read(node)
        if call is None or not _is_layer(call, constant, values):
            continue
        key = str([*(_key(tensor, module) for tensor in call.tensors), *call.options])
        if key not in made:
            made[key] = _free_name(_owner(call.tensors, values), called | set(new))
            new[made[key]] = call.make(*[_value(tensor, values) for tensor in call.tensors], dim=values[node].dim())
        with graph.inserting_before(node):
            source = call.source
            if call.transposed is not None:
                kernel = values[call.tensors[0]].shape[2:]
                source = graph.call_function(spaced, (source, *spacing(kernel, *call.transposed)))
                source.meta = dict(node.meta)
            called_layer = graph.create_node("call_module", made[key], (source,))
        called_layer.meta = dict(node.meta)
        node.replace_all_uses_with(called_layer)
    _erase_unused(graph, module)
    _free_attributes(module, called | set(new))
    for name, layer in new.items():
        owner, _, last = name.rpartition(".")
        if isinstance(getattr(module.get_submodule(owner), last, None), Tensor):
            delattr(module.get_submodule(owner), last)  # the parameter that the layer is named after
        module.add_submodule(name, layer.eval())
    return GraphModule(module, graph, module._get_name())


def _convolution(
    kind: type[nn.Module],
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Call:
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}

    def make(weight: Tensor, bias: Tensor | None, dim: int) -> nn.Module:
        inputs, outputs = weight.shape[1] * groups, weight.shape[0]
        layer = kind(inputs, outputs, tuple(weight.shape[2:]), groups=groups, device="meta", **options)
        return _with(layer, weight=weight, bias=bias)

    return _Call(input, (weight, bias), (kind.__name__, *options.values(), groups), make)


def _transposed(
    kind: type[nn.Module],
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> _Call:
    def make(weight: Tensor, bias: Tensor | None, dim: int) -> nn.Module:
        weight = turned(weight, groups)
        inputs, outputs = weight.shape[1] * groups, weight.shape[0]
        layer = kind(inputs, outputs, tuple(weight.shape[2:]), dilation=dilation, groups=groups, device="meta")
        return _with(layer, weight=weight, bias=bias)

    transposed = stride, padding, output_padding, dilation
    return _Call(input, (weight, bias), (kind.__name__, "transposed", dilation, groups), make, transposed)


def _linear(input: Any, weight: Any, bias: Any = None) -> _Call:
    def make(weight: Tensor, bias: Tensor | None, dim: int) -> nn.Module:
        outputs, inputs = weight.shape
        return _with(nn.Linear(inputs, outputs, device="meta"), weight=weight, bias=bias)

    return _Call(input, (weight, bias), ("Linear",), make)


def _product(input: Any, other: Any) -> _Call:
    def make(weight: Tensor, dim: int) -> nn.Module:
        inputs, outputs = weight.shape
        return _with(nn.Linear(inputs, outputs, device="meta"), weight=weight.t().contiguous(), bias=None)

    return _Call(input, (other,), ("product",), make)


def _sum_of_product(bias: Any, input: Any, other: Any, *, beta: Any = 1, alpha: Any = 1) -> _Call | None:
    def make(weight: Tensor, bias: Tensor, dim: int) -> nn.Module:
        inputs, outputs = weight.shape
        return _with(nn.Linear(inputs, outputs, device="meta"), weight=weight.t().contiguous(), bias=bias)

    return _Call(input, (other, bias), ("product",), make) if beta == alpha == 1 else None


def _batch_norm(
    input: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: Any, momentum: Any, eps: Any, *_: Any
) -> _Call | None:
    def make(weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, dim: int) -> nn.Module:
        layer = NORMS[dim](mean.numel(), eps=eps, affine=weight is not None, device="meta")
        layer.running_mean, layer.running_var = mean.clone(), variance.clone()
        layer.num_batches_tracked = torch.zeros((), dtype=torch.long)
        return _with(layer, weight=weight, bias=bias)

    usable = training is False and mean is not None and (weight is None) == (bias is None)
    return _Call(input, (weight, bias, mean, variance), ("BatchNorm", eps), make) if usable else None


def _functional_batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
) -> _Call | None:
    return _batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)


READERS: dict[Any, Callable[..., _Call | None]] = {
    **dict.fromkeys((F.conv1d, aten.conv1d.default, aten.conv1d.padding), partial(_convolution, nn.Conv1d)),
    **dict.fromkeys((F.conv2d, aten.conv2d.default, aten.conv2d.padding), partial(_convolution, nn.Conv2d)),
    **dict.fromkeys((F.conv_transpose1d, aten.conv_transpose1d.default), partial(_transposed, nn.Conv1d)),
    **dict.fromkeys((F.conv_transpose2d, aten.conv_transpose2d.input), partial(_transposed, nn.Conv2d)),
    **dict.fromkeys((F.linear, aten.linear.default), _linear),
    **dict.fromkeys((operator.matmul, torch.matmul, torch.mm, aten.matmul.default, aten.mm.default), _product),
    **dict.fromkeys(("matmul", "mm", "__matmul__"), _product),
    **dict.fromkeys((torch.addmm, aten.addmm.default), _sum_of_product),
    **dict.fromkeys((torch.batch_norm, aten.batch_norm.default), _batch_norm),
    F.batch_norm: _functional_batch_norm,
}


def _read(node: Node) -> _Call | None:
    if node.op not in ("call_function", "call_method") or node.target not in READERS:
        return None
    try:
        return READERS[node.target](*node.args, **node.kwargs)
    except TypeError:  # arguments that none of these functions is known to take
        return None


def _is_layer(call: _Call, constant: set[Node], values: dict[Node, Any]) -> bool:
    """Whether the source of a call is computed, and everything else in it constant."""
    if not isinstance(call.source, Node) or call.source in constant:
        return False
    if any(isinstance(tensor, Node) and tensor not in constant for tensor in call.tensors):
        return False
    if any(isinstance(part, Node) for part in tree_leaves((call.options, call.transposed))):
        return False
    kind, weight = call.options[0], _value(call.tensors[0], values)
    return kind == "BatchNorm" or (isinstance(weight, Tensor) and (weight.dim() == 2 or kind.startswith("Conv")))


def _constants(graph: Graph) -> set[Node]:
    """Nodes whose values follow from parameters and buffers alone."""
    constant: set[Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (
            node.op.startswith("call_") and inputs and all(map(constant.__contains__, inputs))
        ):
            constant.add(node)
    return constant


def _key(argument: Any, module: GraphModule) -> str:
    """The same for the same parameter, and for the same function of the same parameters."""
    if not isinstance(argument, Node):
        return str(argument)
    if argument.op == "get_attr":
        return str(id(attribute(module, str(argument.target))))
    arguments = map_arg((argument.args, argument.kwargs), lambda node: _key(node, module))
    return f"{argument.op} {argument.target} {arguments}"


def attribute(module: nn.Module, path: str) -> Any:
    """What lies at a dotted `path` in a module."""
    return operator.attrgetter(path)(module)


def _value(tensor: Any, values: dict[Node, Any]) -> Any:
    return values[tensor] if isinstance(tensor, Node) else tensor


def _with(layer: nn.Module, **parameters: Tensor | None) -> nn.Module:
    """`layer` with these parameters: as they are, if they are parameters, else with the values of tensors."""
    for name, value in parameters.items():
        if value is not None and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format))
        setattr(layer, name, value)
    return layer


def _owner(tensors: Sequence[Any], values: dict[Node, Any]) -> str:
    """The name of the module, or else of the parameter, that the first of `tensors` comes from."""
    first = next(tensor for tensor in tensors if isinstance(tensor, Node))
    sources, pending = [], [first]
    while pending:
        node = pending.pop()
        pending.extend(node.all_input_nodes)
        if node.op == "get_attr":
            sources.append(node)
    path = str(max(sources, key=lambda node: values[node].numel()).target)
    parent, _, name = path.rpartition(".")
    name = next((name.removesuffix(end).rstrip("_") for end in ("weight", "running_mean") if name.endswith(end)), name)
    return ".".join(part for part in (parent, name) if part) or "weight"


def _free_name(name: str, taken: set[str]) -> str:
    """`name`, or with a number behind it, so that no module has it and none lies inside another."""
    candidates = (name if index == 1 else f"{name}_{index}" for index in count(1))
    return next(
        new
        for new in candidates
        if not any(new == other or new.startswith(f"{other}.") or other.startswith(f"{new}.") for other in taken)
    )


def _free_attributes(module: GraphModule, layers: set[str]) -> None:
    """Gives every tensor that the graph reads from inside one of `layers` a copy and a name of its own."""
    for node in module.graph.nodes:
        if node.op != "get_attr" or not any(
            node.target.startswith(f"{name}.") or node.target == name for name in layers
        ):
            continue
        value = attribute(module, node.target).detach().clone()
        name = _free_name(node.target.replace(".", "_"), set(vars(module)["_buffers"]) | set(vars(module)["_modules"]))
        module.register_buffer(name, value)
        node.target = name


def _erase_unused(graph: Graph, module: GraphModule) -> None:
    """Erases what nobody reads, except what changes a value in place that somebody may read."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and not _works_in_place(node, module):
            graph.erase_node(node)


def _works_in_place(node: Node, module: GraphModule) -> bool:
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.kwargs.get("inplace") is True or name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
