"""A quantized network as a graph that XNNPACK computes on integers, in ExecuTorch and LiteRT, with the codes it has.

XNNPACK holds weights as int8 steps from zero with a scale for each output channel. Of its int8 kernels, one kind writes
int8 on a fixed grid. A layer gets it where all that reads its output reads it on one grid, so that nothing is rounded
that is not rounded anyway. The other kind writes float32, but takes the grid of its input from the lowest and the
highest value of an image (of a row, for a linear layer). Such a layer gets one or two constant channels more, which
meet weights of zero and hold both ends of the grid that it was given, so that it finds this grid again. What neither
kind can do stays float, on the same values.

Which patterns of quantize and dequantize become which kernel: github.com/pytorch/executorch, version 1.5,
`backends/xnnpack/partition/config/gemm_configs.py`.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from compress.errors import UserError
from compress.models.baking import copied
from compress.quantization import Quantizer
from compress.quantization.activations import InputQuantizer, detach_input_quantizer, input_quantizers
from compress.quantization.grid import per_channel
from compress.quantization.quantized import QuantizedLayer, QuantizedModel

aten = torch.ops.aten
LOWEST, HIGHEST, LEVELS = -128, 127, 256  # of an int8
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv1d.padding, aten.conv2d.padding}
LAYERS = {*CONVOLUTIONS, aten.linear.default}
# Activations that a kernel applies itself, and the range that they cut out.
RANGES = {
    aten.relu: (0.0, float("inf")),
    aten.relu_: (0.0, float("inf")),
    aten.relu6: (0.0, 6.0),
    aten.relu6_: (0.0, 6.0),
    aten.hardtanh: (-1.0, 1.0),
    aten.hardtanh_: (-1.0, 1.0),
}
# What gives the same whether its input is rounded before it, or its output behind it.
MONOTONE = {
    *(aten.max_pool2d, aten.flatten, aten.view, aten.reshape, aten.permute, aten.transpose),
    *(aten.dropout, aten.dropout_, aten.squeeze, aten.unsqueeze, *RANGES),
}
# The largest factor from a sum to a code of the output, and the largest code of a bias, that XNNPACK takes.
LARGEST_GAIN, LARGEST_BIAS = 256.0, 2.0**31 - 1024
SMALLEST = torch.finfo(torch.float32).tiny
BATCH = 32  # a graph is for 1 to so many images


@dataclass(frozen=True)
class TensorGrid:
    """value = scale * (code - zero_point), codes 0..levels-1, for all of a tensor; an int8 is a code less 128."""

    scale: float
    zero_point: int
    levels: int

    @classmethod
    def of(cls, quantizer: InputQuantizer) -> "TensorGrid":
        return cls(float(quantizer.scale), int(quantizer.zero_point), quantizer.levels)

    def value(self, code: int) -> float:
        return self.scale * (code - self.zero_point)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What quantized_decomposed's operators take behind the tensor."""
        return self.scale, self.zero_point + LOWEST, LOWEST, HIGHEST, torch.int8


@dataclass(frozen=True)
class Rounded:
    """The nodes that bring a tensor onto a grid: `first` reads the tensor, `last` has the values.

    `source` has other values, or the same, which the grid would round to these.
    """

    first: Node
    last: Node
    source: Node
    grid: TensorGrid


def check_int8(quantizer: Quantizer, name: str) -> None:
    """Raises UserError, for the export `name`, where `quantizer` has grids whose steps from zero no int8 holds."""
    widths = [*quantizer.widths]
    if widths and quantizer.first_last_bits:
        widths.append(quantizer.first_last_bits)
    bits = max(widths, default=0)
    levels = quantizer.grid.levels(bits) if bits else 0
    if levels > LEVELS:
        raise UserError(f"export: found {name} with {levels} levels at {bits} bits; accepted: up to {LEVELS} levels")
    if quantizer.grid.zero_point == "affine" and quantizer.grid.scale == "mse" and levels > LEVELS // 2:
        raise UserError(
            f"quantizer.grid.zero_point: found affine at {bits} bits for export={name}, whose weights are "
            "steps from zero; accepted: symmetric or mirrored, or up to 7 bits in every layer"
        )


def quantized_graph(quantized: QuantizedModel, shape: Sequence[int], float_inputs: bool = False) -> GraphModule:
    """The graph of `quantized` for images of that shape: weights are int8 buffers wherever an int8 kernel fits.

    It is to be exported once more. float_inputs: the runtime takes any weight that an int8 holds, also for layers that
    no int8 kernel fits, and dequantizes it. Raises UserError for a quantized weight beside a float input elsewhere, and
    where the graph has another weight for a layer than that layer.
    """
    import torch.ao.quantization.fx._decomposed  # noqa: F401 - registers torch.ops.quantized_decomposed

    grids = {name: TensorGrid.of(quantizer) for name, quantizer in input_quantizers(quantized.model).items()}
    layers = quantized.layers | {name: quantized.layers[holder] for name, holder in quantized.tied.items()}
    alone = next((name for name in layers if name not in grids), None)
    if alone is not None and not float_inputs:
        raise UserError(
            f"{alone}: found a quantized weight beside a float input; accepted for ExecuTorch: activation_bits from 2 "
            "to 8, as XNNPACK's kernels take integer weights on integer inputs"
        )
    plain = copied(quantized.model).float().cpu().eval()
    for name in grids:
        detach_input_quantizer(plain.get_submodule(name))
    editor = _Editor(functional(plain, shape))
    editor.round_inputs(grids)
    editor.use_kernels(layers, float_inputs)
    return editor.finished()


def functional(module: nn.Module, shape: Sequence[int]) -> GraphModule:
    """The ATen graph of `module`, without operations in place."""
    graph: GraphModule = exported(module, shape).run_decompositions({}).module(check_guards=False)
    return graph


def exported(module: nn.Module, shape: Sequence[int]) -> ExportedProgram:
    """`module` for 1 to BATCH images."""
    # The backend takes tensors in their order of dimensions alone, and training may have left another.
    module = module.to(memory_format=torch.contiguous_format)
    # With fewer images as an example, PyTorch's choice of a convolution would limit the batch to 15.
    images = torch.zeros(BATCH, *shape)
    batch = {0: torch.export.Dim("batch", min=1, max=BATCH)}
    return torch.export.export(module, (images,), dynamic_shapes=(batch,), strict=False)


class _Editor:
    """Edits an exported `graph`, whose nodes know by their metadata the modules that they come from."""

    def __init__(self, module: GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.layers = [(node, _layer_of(node)) for node in self.graph.nodes if node.target in LAYERS]
        self.rounded: dict[Node, Rounded] = {}  # by the first node

    def round_inputs(self, grids: Mapping[str, TensorGrid]) -> None:
        """Brings the input of each layer onto its grid; layers that read a tensor on the same grid share that."""
        made: dict[tuple[Node, TensorGrid], Rounded] = {}
        for node, name in self.layers:
            if name in grids:
                key = node.args[0], grids[name]
                if key not in made:
                    made[key] = self._round_before(node, *key)
                node.update_arg(0, made[key].last)

    def use_kernels(self, layers: Mapping[str, QuantizedLayer], float_inputs: bool) -> None:
        """Gives each of the `layers` its codes and the kernel that takes them, if there is one.

        float_inputs: without such a kernel, it gets its codes all the same.
        """
        for node, name in self.layers:
            if name not in layers:
                continue
            self._check(node, name, layers[name])
            steps = _steps(layers[name])
            source = self._rounding_of(node.args[0])
            if steps is None or (source is None and not float_inputs):
                continue
            scale = torch.where(steps.flatten(1).any(1), layers[name].grid.scale.float().cpu(), 1.0)
            bias = self._tensor(node.args[2]) if len(node.args) > 2 and node.args[2] is not None else None
            if bool((scale < SMALLEST).any()):
                continue
            if source is not None and self._write_integers(node, source.grid, scale, bias):
                self._set_weight(node, steps, scale)
            elif source is not None and self._can_span(node):
                self._span(node, source, steps, scale)
            elif float_inputs:
                self._set_weight(node, steps, scale)

    def finished(self) -> GraphModule:
        """The edited graph, in which each reader of a rounded tensor dequantizes it on its own, as kernels ask for."""
        self.graph.eliminate_dead_code()
        for rounded in self.rounded.values():
            for user in list(rounded.last.users)[1:]:
                with self.graph.inserting_before(user):
                    user.replace_input_with(rounded.last, self.graph.node_copy(rounded.last))
        self.graph.lint()
        self.module.recompile()
        return self.module

    def _call(self, target: Any, *arguments: Any) -> Node:
        return self.graph.call_function(target, arguments)

    def _round_before(self, place: Node, tensor: Node, grid: TensorGrid) -> Rounded:
        operators = torch.ops.quantized_decomposed
        with self.graph.inserting_before(place):
            first = None
            if _is_narrow(grid):
                first = tensor = self._call(aten.hardtanh.default, tensor, grid.value(0), grid.value(grid.levels - 1))
            codes = self._call(operators.quantize_per_tensor.default, tensor, *grid.arguments)
            last = self._call(operators.dequantize_per_tensor.default, codes, *grid.arguments)
        rounded = Rounded(first or codes, last, tensor, grid)
        self.rounded[rounded.first] = rounded
        return rounded

    def _rounding_of(self, value: Any) -> Rounded | None:
        return next((rounded for rounded in self.rounded.values() if rounded.last is value), None)

    def _check(self, node: Node, name: str, layer: QuantizedLayer) -> None:
        weight = self._tensor(node.args[1])
        if weight is None or not torch.equal(weight, layer.grid.dequantize(layer.codes).cpu()):
            raise UserError(f"{name}: torch.export exported another weight than that of this layer")

    def _tensor(self, node: Any) -> Tensor | None:
        """The parameter or buffer that `node` stands for."""
        if not isinstance(node, Node) or node.op != "get_attr":
            return None
        value: Any = self.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value.detach() if isinstance(value, Tensor) else None

    def _read_on(self, node: Node) -> set[TensorGrid | None]:
        """The grids on which the value of `node` is read; None among them where it is read as it is."""
        found: set[TensorGrid | None] = set()
        for user in node.users:
            if user in self.rounded:
                found.add(self.rounded[user].grid)
            elif _packet(user) in MONOTONE and user.args[0] is node:
                found |= self._read_on(user)
            else:
                found.add(None)
        return found

    def _write_integers(self, node: Node, input_grid: TensorGrid, scale: Tensor, bias: Tensor | None) -> bool:
        """Rounds the output of the layer `node` onto the grid that all its readers have, if that is one."""
        last, low, high = node, float("-inf"), float("inf")
        if len(node.users) == 1 and _packet(user := next(iter(node.users))) in RANGES and user not in self.rounded:
            last = user
            bounds: Any = (*user.args[1:], *RANGES[_packet(user)][len(user.args) - 1 :])
            low, high = bounds
        grids = self._read_on(last)
        grid = grids.pop() if len(grids) == 1 else None
        if grid is None:
            return False
        sums = input_grid.scale * scale.double()
        fits = bool((sums / grid.scale < LARGEST_GAIN).all())
        if not fits or (bias is not None and bool((bias.double().abs() / sums > LARGEST_BIAS).any())):
            return False
        readers = list(last.users)
        place = source = last
        if _is_narrow(grid):
            low, high = max(low, grid.value(0)), min(high, grid.value(grid.levels - 1))
            with self.graph.inserting_after(last):
                place = source = self._call(aten.hardtanh.default, node, low, high)
        operators = torch.ops.quantized_decomposed
        with self.graph.inserting_after(place):
            codes = self._call(operators.quantize_per_tensor.default, source, *grid.arguments)
        with self.graph.inserting_after(codes):
            values = self._call(operators.dequantize_per_tensor.default, codes, *grid.arguments)
        for reader in readers:
            if reader in self.rounded:
                self.rounded.pop(reader).last.replace_all_uses_with(values)
            else:
                reader.replace_input_with(last, values)
        self.rounded[codes] = Rounded(codes, values, values, grid)
        return True

    def _can_span(self, node: Node) -> bool:
        """Whether the kernel that writes float32 takes such a layer."""
        if node.target is aten.linear.default:
            return True
        groups = node.args[6] if len(node.args) > 6 else 1
        return bool(_packet(node) is aten.conv2d and groups == 1)

    def _span(self, node: Node, rounded: Rounded, steps: Tensor, scale: Tensor) -> None:
        """Gives the input of `node` channels that hold both ends of 256 levels, and the weight as many of zeros.

        Zero is an end that the kernel counts as a value of every image.
        """
        grid = rounded.grid
        ends = [grid.value(code) for code in (0, HIGHEST - LOWEST) if code != grid.zero_point]
        padding = [0, 1] if node.target is aten.linear.default else [0, 0, 0, 0, 0, 1]
        tensor: Any = rounded.source
        operators = torch.ops.quantized_decomposed
        with self.graph.inserting_before(node):
            if node.target is not aten.linear.default and not _is_channels_last(tensor):
                # The backend pads channels rightly only where they come last, as this leaves them, and nothing else.
                tensor = self._call(aten.max_pool2d.default, tensor, [1, 1])
            for end in ends:
                tensor = self._call(aten.constant_pad_nd.default, tensor, padding, end)
            for target in (operators.quantize_per_tensor.default, operators.dequantize_per_tensor.default):
                tensor = self._call(target, tensor, *grid.arguments)
            found = self._call(operators.choose_qparams.tensor, tensor, LOWEST, HIGHEST, SMALLEST, torch.int8)
            pair = [self._call(operator.getitem, found, index) for index in (0, 1)]
            for target in (operators.quantize_per_tensor.tensor, operators.dequantize_per_tensor.tensor):
                tensor = self._call(target, tensor, *pair, LOWEST, HIGHEST, torch.int8)
        node.update_arg(0, tensor)
        zeros = steps.new_zeros(len(steps), len(ends), *steps.shape[2:])
        self._set_weight(node, torch.cat([steps, zeros], 1), scale)

    def _set_weight(self, node: Node, steps: Tensor, scale: Tensor) -> None:
        number = sum(1 for name, _ in self.module.named_buffers() if name.startswith("steps_"))
        parts = {
            "steps": steps.to(torch.int8).contiguous(),
            "scale": scale,
            "zero": torch.zeros(len(scale), dtype=torch.int64),
        }
        with self.graph.inserting_before(node):
            nodes = []
            for kind, value in parts.items():
                self.module.register_buffer(f"{kind}_{number}", value)
                nodes.append(self.graph.get_attr(f"{kind}_{number}"))
            target = torch.ops.quantized_decomposed.dequantize_per_channel.default
            node.update_arg(1, self._call(target, *nodes, 0, LOWEST, HIGHEST, torch.int8))


def _layer_of(node: Node) -> str:
    """The name of the module whose forward became `node`."""
    modules = list(node.meta.get("nn_module_stack", {}).values())
    return str(modules[-1][0]) if modules else ""


def _packet(node: Node) -> Any:
    """The operator of `node`, whatever its overload."""
    return getattr(node.target, "overloadpacket", None)


def _is_narrow(grid: TensorGrid) -> bool:
    """Whether an int8 has more levels; XNNPACK cuts off at the ends of an int8 alone."""
    return grid.levels <= HIGHEST - LOWEST


def _is_channels_last(node: Node) -> bool:
    """Whether the backend certainly has the value of `node` with its channels last."""
    if _packet(node) in (aten.conv2d, aten.max_pool2d):
        return True
    operators = torch.ops.quantized_decomposed
    same = {*RANGES, aten.add, operators.quantize_per_tensor, operators.dequantize_per_tensor}
    return _packet(node) in same and all(map(_is_channels_last, node.all_input_nodes))


def _steps(layer: QuantizedLayer) -> Tensor | None:
    """The codes of `layer` as whole steps from zero, (N, ...), if an int8 holds them."""
    zero_point = layer.grid.zero_point.cpu().to(torch.int32)
    steps = layer.codes.cpu().to(torch.int32) - per_channel(zero_point, layer.codes)
    return steps if int(steps.min()) >= LOWEST and int(steps.max()) <= HIGHEST else None
