"""The graph of a network's forward, a torch.fx.GraphModule: images in, every operation a node.

`symbolic` is torch.fx's tracing: quick, and modules stay modules, but it cannot follow branches on shapes or `len` of a
tensor, and does not enter modules of torch that multiply weights, such as MultiheadAttention. `exported` is
torch.export's, slower by far, which follows these and makes every operation a function.
"""

import contextlib
import copy
import inspect
import logging
import operator
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_unflatten

# Graphs of torch.export that are kept, since each variant of a network is read back from its file.
REMEMBERED = 8
_graphs: dict[str, tuple[fx.Graph, dict[str, Tensor]]] = {}


def symbolic(network: nn.Module) -> fx.GraphModule:
    """The graph that torch.fx finds without any values. Raises whatever torch.fx and the network's forward raise."""
    graph = _Tracer().trace(network)
    for node in graph.nodes:
        # Images may come in another memory layout, where a view would not be possible.
        if node.op == "call_method" and node.target == "view":
            node.target = "reshape"
    return fx.GraphModule(network, graph, type(network).__name__)


def exported(network: nn.Module, images: Tensor, anew: bool = False) -> fx.GraphModule:
    """The graph that torch.export finds for any number of `images`. Raises whatever torch.export raises.

    A network that looks like one before it gets that one's graph with its own tensors, unless it is traced `anew`. That
    is wrong where they differ in what `repr` does not show: compare what it computes.
    """
    key = f"{network} {tuple(images.shape)} {images.dtype} {images.device}"
    if anew or key not in _graphs:
        if len(_graphs) == REMEMBERED:
            _graphs.pop(next(iter(_graphs)))
        _graphs[key] = _export(network, images)
    graph, constants = _graphs[key]
    return fx.GraphModule({**_tensors(network), **constants}, copy.deepcopy(graph), type(network).__name__)


def _export(network: nn.Module, images: Tensor) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The graph, and the tensors in it that are none of the network's parameters and buffers."""
    batch = torch.export.Dim.DYNAMIC
    with quiet():
        try:
            program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},), strict=False)
        except Exception:
            # With `strict` the bytecode is followed, `len(images)` too.
            program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},), strict=True)
        module = program.module(check_guards=False)
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    output = graph.output_node()
    leaves: Any = output.args[0]
    output.args = (tree_unflatten(list(leaves), program.call_spec.out_spec),)
    tensors, constants = _tensors(network), {}
    for node in graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
        if node.op == "get_attr" and node.target not in tensors:
            constants[node.target] = operator.attrgetter(node.target)(module)
    return graph, constants


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    names = (network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False))
    return {name: tensor for named in names for name, tensor in named}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no log of torch's exporters, which have much to say about their passes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Tracer(fx.Tracer):
    """Traces a forward with its first argument alone, the others at their defaults.

    What timm tells tracers not to enter becomes one node. Transposed convolutions are entered, and functions then.
    """

    def __init__(self) -> None:
        modules, functions = _not_entered_in_timm()
        super().__init__(autowrap_functions=functions)
        self._leaves = modules

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # What holds parameters is entered all the same: they may be weights.
        if isinstance(m, nn.ConvTranspose1d | nn.ConvTranspose2d):
            return False
        closed = isinstance(m, self._leaves) and not any(True for _ in m.parameters())
        return closed or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        forward = inspect.unwrap(root_fn)
        first = next(iter([*inspect.signature(forward).parameters][1:]), "images")
        return forward, [self.root, self.create_proxy("placeholder", first, (), {})]


def _not_entered_in_timm() -> tuple[tuple[type[nn.Module], ...], tuple[Callable[..., Any], ...]]:
    """Modules and functions that timm registers for tracers; none where nobody has imported timm."""
    registry = sys.modules.get("timm.layers._fx")
    if registry is None:
        return (), ()
    return tuple(registry.get_notrace_modules()), tuple(registry.get_notrace_functions())
