"""A network made ready for quantization: copied, folded, traced, and its layers chosen."""

import copy
import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Graph

from compress.errors import UserError
from compress.models.folding import bake_parametrizations, find_foldable, fold_pairs, trace
from compress.quantization.calibration import gather

PLAIN = "plain Conv2d or Linear"
NAMED = 3  # layers that a message lists before it only counts


@dataclass(frozen=True)
class Prepared:
    """A float copy of a network, folded and traced: `all_layers` and, without the `skipped`, `order`, as executed."""

    analog: nn.Module
    graph: Graph
    all_layers: list[str]
    order: list[str]
    skipped: dict[str, str]
    folded: list[tuple[str, str]]

    @property
    def outer(self) -> set[str]:
        """The first and the last layer, skipped or not."""
        return {self.all_layers[0], self.all_layers[-1]}

    def widths(self, bits: int | Mapping[str, int] | None, first_last: int | None) -> dict[str, int | None]:
        """Bits of each layer: those of a mapping `bits`, else `bits`, and `first_last` for the first and last one."""
        if isinstance(bits, Mapping):
            missing = next((name for name in self.order if name not in bits), None)
            if missing:
                raise UserError(f"bits: found none for {missing}; accepted: a width for each layer")
            for name in self.order:
                _check_bits(f"bits.{name}", bits[name])
            return {name: bits[name] for name in self.order}
        if bits is not None:
            _check_bits("bits", bits)
        if bits is None or first_last is None:
            return dict.fromkeys(self.order, bits)
        return {name: first_last if name in self.outer else bits for name in self.order}

    def norms(self) -> list[str]:
        """The batch norms that could not be folded."""
        return [name for name, module in self.analog.named_modules() if isinstance(module, nn.BatchNorm2d)]

    def gather(self, batches: Iterable) -> list[Tensor]:
        """The calibration images on the network's device, in its type."""
        reference = self.analog.get_submodule(self.order[0]).weight
        return gather(batches, reference.device, reference.dtype)


def prepare(model: nn.Module, skip: Sequence[str] = ()) -> Prepared:
    """A copy of `model` ready for `walk`; raises UserError as `quantize` does."""
    analog = bake_parametrizations(copy.deepcopy(model).eval())
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in analog.parameters()):
        analog = analog.float()
    folded = find_foldable(analog)
    fold_pairs(analog, folded)
    graph = trace(analog)
    all_layers, skipped = choose_layers(analog, graph, skip)
    order = [name for name in all_layers if name not in skipped]
    return Prepared(analog, graph, all_layers, order, skipped, folded)


def check_layers(model: nn.Module, skip: Sequence[str], key: str) -> None:
    """Raises, without quantizing, the UserErrors that `quantize` has for a model and `skip`, which they call `key`."""
    try:
        choose_layers(model, trace(model), skip)
    except UserError as mistake:
        raise UserError(f"{key}: {str(mistake).removeprefix('skip: ')}") from None


def choose_layers(model: nn.Module, graph: Graph, patterns: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(names of all layers that can be quantized, in execution order; why each of the others stays float).

    A layer that `patterns` exclude is in both. `graph` is that of `model`. Raises UserError for a pattern that matches
    no layer, and where no layer is left to quantize.
    """
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    named = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    skipped = {}
    for name, module in model.named_modules():
        matrices = any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        if matrices and name not in named and type(module).__module__.startswith("torch.nn.modules."):
            skipped[name] = f"is a {type(module).__name__}, which is not a {PLAIN}"
    for name, module in named.items():
        if type(module) not in (nn.Conv2d, nn.Linear):
            skipped[name] = f"is a {type(module).__name__}, which is not a {PLAIN}"
        elif calls[name] != 1:
            skipped[name] = f"is called {calls[name]} times" if calls[name] else "is never called on its own"
    layers = [name for name in calls if name in named and name not in skipped]
    for pattern in patterns:
        matches = fnmatch.filter(named, pattern)
        if not matches:
            raise UserError(f"skip: found {pattern!r}, which matches no layer; accepted: {', '.join(named)}")
        skipped.update((name, f"skip: {pattern}") for name in matches if name not in skipped)
    if not any(name not in skipped for name in layers):
        reasons = [f"{name} {reason}" for name, reason in skipped.items()]
        more = f", and {len(reasons) - NAMED} more" if len(reasons) > NAMED else ""
        listed = ", ".join(reasons[:NAMED]) + more if reasons else "it has none with weights"
        raise UserError(f"{type(model).__name__}: found no layer left to quantize ({listed}); accepted: {PLAIN}")
    return layers, skipped


def _check_bits(key: str, bits: object) -> None:
    if type(bits) is not int or not 1 <= bits <= 16:
        raise UserError(f"{key}: found {bits!r}; accepted: a whole number from 1 to 16")
