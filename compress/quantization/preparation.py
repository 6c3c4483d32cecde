"""A network made ready for quantization: canonical, folded, its layers chosen, beside the calibration images."""

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from compress.errors import UserError
from compress.models.canonical import canonical, layers
from compress.models.folding import find_foldable, fold_pairs
from compress.quantization.calibration import CalibrationBatches, gather, repeated_inputs

ACCEPTED = "Conv1d, Conv2d, their transposes and Linear"
NAMED = 3  # layers that a message lists before it only counts


@dataclass(frozen=True)
class Choice:
    """Which layers of a canonical network are quantized.

    layers: all that could be, in execution order, without those of `tied`. skipped: why each other holder of a matrix
    or kernel, and each layer that a pattern excludes, stays float. tied: by layer, the one before it that has the same
    weight, and that it shares the codes with.
    """

    layers: list[str]
    skipped: dict[str, str]
    tied: dict[str, str]

    @property
    def order(self) -> list[str]:
        """The layers that are quantized."""
        return [name for name in self.layers if name not in self.skipped]


@dataclass(frozen=True)
class Prepared:
    """A float canonical copy of a network, folded, its `choice` of layers, and the calibration `images` in its type."""

    analog: GraphModule
    images: list[Tensor]
    choice: Choice
    folded: list[tuple[str, str]]
    outer: frozenset[str]

    @property
    def graph(self) -> Graph:
        return self.analog.graph

    @property
    def order(self) -> list[str]:
        return self.choice.order

    def widths(self, bits: int | Mapping[str, int], first_last: int | None) -> dict[str, int]:
        """Bits of each layer: those of a mapping `bits`, else `bits`, and `first_last` for the first and last one."""
        if isinstance(bits, Mapping):
            missing = next((name for name in self.order if name not in bits), None)
            if missing:
                raise UserError(f"bits: found none for {missing}; accepted: a width for each layer")
            for name in self.order:
                _check_bits(f"bits.{name}", bits[name])
            return {name: bits[name] for name in self.order}
        _check_bits("bits", bits)
        if first_last is None:
            return dict.fromkeys(self.order, bits)
        return {name: first_last if name in self.outer else bits for name in self.order}

    def repeated(self) -> dict[str, list[Tensor]]:
        """What each layer that is called again, or whose weight another layer has, multiplies there in float."""
        calls = Counter(node.target for node in self.graph.nodes if node.op == "call_module")
        sharing = {name: [other for other, holder in self.choice.tied.items() if holder == name] for name in self.order}
        shared = {name: others for name, others in sharing.items() if others or calls[name] > 1}
        return repeated_inputs(self.analog, self.images, shared) if shared else {}

    def norms(self) -> list[str]:
        """The batch norms that could not be folded."""
        return [name for name, module in self.analog.named_modules() if isinstance(module, nn.BatchNorm2d)]


def prepare(model: nn.Module, calibration_batches: CalibrationBatches, skip: Sequence[str] = ()) -> Prepared:
    """A copy of `model` ready for `walk`; raises UserError as `quantize` does."""
    tensors = [tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point()]
    like = tensors[0] if tensors else torch.empty(0)
    wide = torch.promote_types(like.dtype, torch.float32)
    images = gather(calibration_batches, like.device, wide)
    analog = canonical(model, images[0].shape[1:])
    folded = find_foldable(analog)
    fold_pairs(analog, folded)
    choice = choose_layers(analog, skip)
    every = list(layers(analog))
    outer = frozenset(choice.tied.get(name, name) for name in (every[0], every[-1]))
    return Prepared(analog, images, choice, folded, outer)


def check_layers(model: nn.Module, input_shape: Sequence[int], skip: Sequence[str], key: str) -> None:
    """Raises, without quantizing, the UserErrors that `quantize` has for a model and `skip`, which they call `key`."""
    try:
        choose_layers(canonical(model, input_shape), skip)
    except UserError as mistake:
        raise UserError(f"{key}: {str(mistake).removeprefix('skip: ')}") from None


def choose_layers(network: GraphModule, patterns: Sequence[str]) -> Choice:
    """The layers of a canonical network without those that `patterns`, names or globs, exclude.

    Raises UserError for a pattern that matches no layer, and where no layer is left to quantize.
    """
    every = layers(network)
    first: dict[int, str] = {}
    tied = {}
    for name, layer in every.items():
        holder = first.setdefault(id(layer.weight), name)
        if holder != name:
            tied[name] = holder
    skipped = _elsewhere(network, set(first))
    for pattern in patterns:
        matches = fnmatch.filter(every, pattern)
        if not matches:
            raise UserError(f"skip: found {pattern!r}, which matches no layer; accepted: {', '.join(every)}")
        for name in matches:
            skipped.setdefault(tied.get(name, name), f"skip: {pattern}")
    chosen = [name for name in every if name not in tied]
    if not any(name not in skipped for name in chosen):
        reasons = [f"{name} {reason}" for name, reason in skipped.items()]
        more = f", and {len(reasons) - NAMED} more" if len(reasons) > NAMED else ""
        listed = ", ".join(reasons[:NAMED]) + more if reasons else "it has none with weights"
        raise UserError(f"{network._get_name()}: found no layer left to quantize ({listed}); accepted: {ACCEPTED}")
    return Choice(chosen, skipped, {name: holder for name, holder in tied.items() if holder not in skipped})


def _elsewhere(network: GraphModule, weights: set[int]) -> dict[str, str]:
    """Why each matrix or kernel that is none of the `weights` of layers stays float, by the name of its module."""
    readers = {
        node.target: next(iter(node.users)) for node in network.graph.nodes if node.op == "get_attr" and node.users
    }
    reasons = {}
    for name, parameter in network.named_parameters():
        if parameter.dim() < 2 or id(parameter) in weights:
            continue
        if name in readers:
            reasons[name] = f"is read by {readers[name].name.rstrip('_0123456789')}"
        else:
            owner = name.rpartition(".")[0]
            reasons[owner] = f"is a {type(network.get_submodule(owner)).__name__}"
    return reasons


def _check_bits(key: str, bits: object) -> None:
    if type(bits) is not int or not 1 <= bits <= 16:
        raise UserError(f"{key}: found {bits!r}; accepted: a whole number from 1 to 16")
