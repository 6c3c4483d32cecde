"""Any network as a graph of torch.nn's modules, each of which multiplies one weight.

What folds and quantizes networks works on this form alone, so that a weight is found however a network uses it: under
two names, in a subclass, computed from parameters, or read by a function. A canonical network is in eval mode, takes
images and returns logits; its tensors have the names that they have in the network, unless they are computed.
"""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from compress.errors import UserError, first_line
from compress.models.baking import bake, copied
from compress.models.outputs import logits
from compress.models.tracing import exported, symbolic
from compress.models.weight_calls import replace_weight_calls

# Of logits, relative to their norm: the graph computes the same in another way, and may differ in rounding alone.
TOLERANCE = 1e-4
# The share of the weights that torch.fx has to find in modules; below it, torch.export is tried, which takes longer.
ENOUGH = 0.98
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
Layer = nn.Conv1d | nn.Conv2d | nn.Linear
# Where a node keeps how many dimensions its value has.
DIMENSIONS = "dimensions"


@torch.no_grad()
def canonical(network: nn.Module, input_shape: Sequence[int]) -> GraphModule:
    """A canonical copy of `network`, in float32 at least, for images of `input_shape`, (C, H, W).

    `network` stays as it is. Raises UserError where it branches on values, gives other logits for the same images in
    the next call, or cannot be traced for another reason.
    """
    plain = bake(copied(network).eval())
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in plain.parameters()):
        plain = plain.float()
    images = probe(plain, input_shape)
    try:
        expected, of_two = (logits(plain(images[:count].clone())) for count in (3, 2))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as failure:
        reason = first_line(failure)
        shape = tuple(input_shape)
        raise UserError(
            f"{type(network).__name__}: found a forward that fails for images {shape}: {reason}"
        ) from failure
    best, most, reasons = None, -1.0, []
    for trace in (symbolic, partial(exported, images=images), partial(exported, images=images, anew=True)):
        try:
            found = _in_modules(trace(plain), images, expected)
            if not _is_same(found(images[:2].clone()), of_two):
                raise ValueError("the traced graph holds for one number of images alone")
        except Exception as failure:  # whatever Python does to a proxy can fail with any exception
            reasons.append(first_line(failure))
            continue
        share = weights_in_layers(found)
        if share > most:
            best, most = found, share
        if share >= ENOUGH or trace is not symbolic:
            break
    if best is None:
        raise UserError(
            f"{type(network).__name__}: found a forward that cannot be traced ({reasons[-1]}); accepted: one that does "
            "not branch on the values of tensors, and gives the same logits for the same images"
        )
    return best


def probe(network: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """Three images of noise, (3, C, H, W), in the type and on the device of `network`, the same in every call."""
    like = next((parameter for parameter in network.parameters() if parameter.is_floating_point()), torch.empty(0))
    return torch.randn(3, *input_shape, generator=torch.Generator().manual_seed(0)).to(like)


def layer_of(network: nn.Module, name: str) -> Layer:
    """The layer called `name`, which is one of the `layers` of a canonical network."""
    return cast(Layer, network.get_submodule(name))


def layers(network: GraphModule) -> dict[str, Layer]:
    """The layers of a canonical network by name, in the order in which they are first called."""
    called = dict.fromkeys(node.target for node in network.graph.nodes if node.op == "call_module")
    return {name: layer_of(network, name) for name in called if type(network.get_submodule(name)) in LAYERS}


def weights_in_layers(network: GraphModule) -> float:
    """The share, 0..1, of the numbers in matrices and kernels of a canonical network that are weights of `layers`."""
    every = {id(parameter): parameter.numel() for parameter in network.parameters() if parameter.dim() > 1}
    found = {id(layer.weight) for layer in layers(network).values()}
    total = sum(every.values())
    return sum(every[weight] for weight in found) / total if total else 0.0


def difference(changed: Tensor, reference: Tensor) -> float:
    """|changed - reference| / |reference|, in float64; 0 where both are zero, infinite where `changed` is."""
    changed, reference = changed.detach().double(), reference.detach().double()
    distance, norm = float((changed - reference).norm()), float(reference.norm())
    if distance == 0:
        return 0.0
    return distance / norm if norm and distance < float("inf") else float("inf")


def _in_modules(traced: GraphModule, images: Tensor, expected: Tensor) -> GraphModule:
    recorder = _Recorder(traced)
    recorder.run(images.clone())
    values = recorder.values
    output = traced.graph.output_node()
    candidates = [leaf for leaf in tree_leaves(output.args[0]) if isinstance(leaf, Node)]
    chosen = next((node for node in candidates if _is_same(values[node], expected)), None)
    if chosen is None:
        raise ValueError("the traced graph gives other logits")
    output.args = (chosen,)
    for node, value in values.items():
        node.meta = {DIMENSIONS: value.dim()} if isinstance(value, Tensor) else {}
    found = replace_weight_calls(traced, values).eval()
    if not _is_same(found(images.clone()), expected):
        raise ValueError("the graph of its modules gives other logits")
    return found


def _is_same(value: object, expected: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.shape != expected.shape:
        return False
    # Weights that are not finite are refused where their layer can be named.
    return not bool(expected.isfinite().all()) or difference(value, expected) <= TOLERANCE


class _Recorder(Interpreter):
    """Keeps what every node of a graph computes."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[Node, object] = {}

    def run_node(self, n: Node) -> object:
        self.values[n] = super().run_node(n)
        return self.values[n]
