"""Turns the ATen graph of a network into operators of LiteRT, one by one, with the integers that the graph has.

The graph is torch.export's, of a float network or what `compress.export.xnnpack_graph` made of a quantized one.
LiteRT's convolutions want channels last, so each tensor here has an order in which its dimensions are stored. It is
handed on by what computes element by element, and a TRANSPOSE is written only where an operator needs another one.

A layer whose output the graph quantizes becomes an int8 operator; one on grids of their own for each image an operator
with float inputs and int8 weights, which LiteRT quantizes the inputs of, onto the grid that the graph has made sure of.
Any other integer weight is dequantized when the file is loaded. The operators: `schema.fbs` of LiteRT, and
ai.google.dev/edge/litert/conversion/tensorflow/quantization/quantization_spec.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor
from torch.fx import GraphModule, Node

from compress.errors import UserError
from compress.export.litert_file import GraphFile, Quantization
from compress.export.xnnpack_graph import HIGHEST, RANGES

aten = torch.ops.aten
CHANNELS_LAST = (0, 2, 3, 1)
HIGHEST_OF_4 = 7  # of an int4
PADDING_SAME, PADDING_VALID = 0, 1  # schema.fbs
NO_ACTIVATION, RELU, RELU_N1_TO_1, RELU6 = 0, 1, 2, 3  # schema.fbs: what an operator applies itself
ACTIVATIONS = {(0.0, float("inf")): RELU, (0.0, 6.0): RELU6, (-1.0, 1.0): RELU_N1_TO_1}
# Operators of one tensor that change its values one by one.
UNARY = {
    aten.abs: "ABS",
    aten.elu: "ELU",
    aten.exp: "EXP",
    aten.hardswish: "HARD_SWISH",
    aten.neg: "NEG",
    aten.relu: "RELU",
    aten.relu6: "RELU6",
    aten.rsqrt: "RSQRT",
    aten.sigmoid: "LOGISTIC",
    aten.sqrt: "SQRT",
    aten.tanh: "TANH",
}
SAME = {aten.alias, aten.clone, aten.contiguous, aten.detach, aten.dropout, aten.lift_fresh_copy, aten._to_copy}
RESHAPES = {
    *(aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze),
}
LOWERINGS: dict[Any, Callable[..., Any]] = {}


@dataclass(frozen=True)
class Value:
    """A tensor of the file that stands for one of the graph.

    sizes: those of the graph; a negative one is so many times the number of images. order: the dimension of the graph
    that is stored first, second and so on. grid: that of int8 codes, which then stand for the floats of the graph.
    """

    tensor: int
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    grid: Quantization | None = None

    @property
    def stored(self) -> list[int]:
        return [self.sizes[dimension] for dimension in self.order]

    def axes(self, dimensions: Sequence[int]) -> list[int]:
        """Where these dimensions are stored."""
        return sorted(self.order.index(dimension % len(self.sizes)) for dimension in dimensions)


@dataclass(frozen=True)
class Weight:
    """Int8 `codes` (N, ...) of a weight and the `grid` of its channels."""

    codes: Tensor
    grid: Quantization


@dataclass(frozen=True)
class Ends:
    """`value` and further channels, in the dimension `dimension`, that hold the `ends` of its grid everywhere."""

    value: Value
    dimension: int
    ends: tuple[float, ...]


@dataclass(frozen=True)
class Spanned:
    """A float value that holds both ends of its grid, so that an operator may find that grid again."""

    value: Value


@dataclass(frozen=True)
class Layer:
    """An operator with a weight: its name and options in schema.fbs, and the sizes and the order of its output.

    layout: the order of dimensions in which it wants the weight.
    """

    name: str
    options: dict[str, Any]
    layout: tuple[int, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]


def write_graph(module: GraphModule, file: GraphFile) -> tuple[int, int]:
    """Adds the operators of `module` to `file`; returns the tensors of its images and its logits.

    Raises UserError for an operator that is not known here.
    """
    return _Writer(module, file).written()


def lowers(*packets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks the method that writes these operators of ATen; it gets the node and the arguments by their names."""

    def mark(method: Callable[..., Any]) -> Callable[..., Any]:
        LOWERINGS.update(dict.fromkeys(packets, method))
        return method

    return mark


class _Writer:
    def __init__(self, module: GraphModule, file: GraphFile) -> None:
        self.module, self.file = module, file
        # What is computed from parameters and buffers alone is a Tensor.
        self.values: dict[Node, Any] = {}
        self.images: Value | None = None
        self._floats: dict[int, Value] = {}
        self._rounded: dict[tuple[int, str], Value] = {}
        self._orders: dict[tuple[int, tuple[int, ...]], Value] = {}

    def written(self) -> tuple[int, int]:
        logits = -1
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                sizes = _sizes(node)
                self.images = Value(self.file.tensor(sizes), sizes, identity(len(sizes)))
                self.values[node] = self.images
            elif node.op == "get_attr":
                self.values[node] = operator.attrgetter(node.target)(self.module)
            elif node.op == "output":
                [result] = node.args[0]
                logits = self.ordered(self.floats(result)).tensor
            elif node not in self.values:
                self.values[node] = self._lowered(node)
        assert self.images is not None
        return self.images.tensor, logits

    def _lowered(self, node: Node) -> Any:
        packet = _packet(node)
        if packet is operator.getitem:
            source, index = node.args
            return self.values[source][index]  # type: ignore[index]
        if packet is aten.sym_size or not isinstance(node.target, torch._ops.OpOverload):
            return None  # sizes, which are read off the metadata
        arguments = _arguments(node)
        known = [self.values.get(one) for one in node.all_input_nodes]
        constant = all(isinstance(one, Tensor) for one in known) and not _varies(node)
        if constant and packet is not torch.ops.quantized_decomposed.dequantize_per_channel:
            return node.target(*_filled(node.args, self.values), **_filled(node.kwargs, self.values))
        if packet in SAME:
            return self.values[arguments["x"]]
        if packet in UNARY:
            return self._unary(UNARY[packet], arguments["x"])
        if packet in RESHAPES:
            return self.reshaped(self.value(arguments["x"]), _sizes(node))
        if packet not in LOWERINGS:
            raise UserError(f"found {packet}, which is not written for LiteRT; accepted: export=onnx or openvino")
        return LOWERINGS[packet](self, node, **arguments)

    # Values, and the forms in which operators take them.

    def value(self, source: Any) -> Value:
        """The value of a node or number, or `source` itself if it is one."""
        found = self.values[source] if isinstance(source, Node) else source
        if isinstance(found, Weight):
            codes = self.file.constant(found.codes.numpy(), "INT8", found.grid)
            return self.emit("DEQUANTIZE", [codes], tuple(found.codes.shape))
        if isinstance(found, Value):
            return found
        if found is None:
            raise UserError(f"found a value that depends on the number of images ({source}); accepted: export=onnx")
        tensor = torch.as_tensor(found)
        if tensor.is_floating_point() or tensor.dtype in (torch.int64, torch.bool):
            tensor = tensor.float()
        sizes = tuple(tensor.shape)
        return Value(self._numbers(tensor.detach().cpu().numpy()), sizes, identity(len(sizes)))

    def floats(self, source: Any) -> Value:
        value = self.value(source)
        if value.grid is None:
            return value
        if value.tensor not in self._floats:
            self._floats[value.tensor] = self.emit("DEQUANTIZE", [value.tensor], value.sizes, value.order)
        return self._floats[value.tensor]

    def ordered(self, value: Value, order: tuple[int, ...] | None = None) -> Value:
        """`value` with its dimensions stored in that order, by default in their own."""
        order = order or identity(len(value.sizes))
        if value.order == order:
            return value
        key = value.tensor, order
        if key not in self._orders:
            axes = self._integers([value.order.index(dimension) for dimension in order])
            if _moves_nothing(value, order):
                turned = replace(value, order=order)
                result = self._reshape(value.tensor, turned.stored, value.grid)
                self._orders[key] = replace(turned, tensor=result)
            else:
                self._orders[key] = self.emit("TRANSPOSE", [value.tensor, axes], value.sizes, order, grid=value.grid)
        return self._orders[key]

    def emit(
        self,
        name: str,
        inputs: Sequence[int],
        sizes: tuple[int, ...],
        order: tuple[int, ...] | None = None,
        grid: Quantization | None = None,
        **options: Any,
    ) -> Value:
        """The output of a new operator."""
        order = order or identity(len(sizes))
        value = Value(-1, sizes, order, grid)
        tensor = self.file.tensor(value.stored, "FLOAT32" if grid is None else "INT8", grid)
        self.file.operator(name, inputs, [tensor], **options)
        return replace(value, tensor=tensor)

    def reshaped(self, value: Value, sizes: tuple[int, ...]) -> Value:
        if value.sizes == sizes:
            return value
        if not _moves_nothing(value, identity(len(value.sizes))):
            value = self.ordered(value)
        return Value(self._reshape(value.tensor, sizes, value.grid), sizes, identity(len(sizes)), value.grid)

    def _reshape(self, tensor: int, sizes: Sequence[int], grid: Quantization | None) -> int:
        shape = [max(size, -1) for size in sizes]
        if shape.count(-1) > 1:
            raise UserError("found a shape with the number of images in two of its sizes; accepted: export=onnx")
        result = self.file.tensor(sizes, "FLOAT32" if grid is None else "INT8", grid)
        self.file.operator("RESHAPE", [tensor, self._integers(shape)], [result], newShape=shape)
        return result

    def _integers(self, values: Sequence[int]) -> int:
        return self.file.constant(np.array(values, np.int32), "INT32")

    def _numbers(self, values: np.ndarray) -> int:
        return self.file.constant(values.astype(np.float32), "FLOAT32")

    # Element by element.

    def _unary(self, name: str, source: Any, **options: Any) -> Value:
        value = self.floats(source)
        return self.emit(name, [value.tensor], value.sizes, value.order, **options)

    def binary(self, name: str, first: Any, second: Any, activation: int = NO_ACTIVATION) -> Value:
        """`first` and `second`, nodes, values or numbers, which are broadcast as torch does."""
        operands = [self._operand(source) for source in (first, second)]
        rank = max(operand.dim() if isinstance(operand, Tensor) else len(operand.sizes) for operand in operands)
        one, other = (
            operand.reshape([1] * (rank - operand.dim()) + [*operand.shape])
            if isinstance(operand, Tensor)
            else self._with_rank(operand, rank)
            for operand in operands
        )
        sizes = tuple(_broadcast(*pair) for pair in zip(_shape(one), _shape(other), strict=True))
        varying = [operand for operand in (one, other) if isinstance(operand, Value)]
        order = next((value.order for value in varying if value.sizes == sizes), varying[0].order)
        pair = [
            self.ordered(operand, order).tensor
            if isinstance(operand, Value)
            else self._numbers(operand.permute(order).detach().cpu().numpy())
            for operand in (one, other)
        ]
        options: dict[str, Any] = {} if name in ("MAXIMUM", "MINIMUM") else {"fusedActivationFunction": activation}
        return self.emit(name, pair, sizes, order, **options)

    def _operand(self, source: Any) -> Value | Tensor:
        """A value of floats, or what is known already."""
        found = self.values[source] if isinstance(source, Node) else source
        return found if isinstance(found, Tensor) else torch.tensor(found) if _is_number(found) else self.floats(source)

    def _with_rank(self, value: Value, rank: int) -> Value:
        return self.reshaped(value, (1,) * (rank - len(value.sizes)) + value.sizes)

    @lowers(aten.add)
    def _add(self, node: Node, x: Any, other: Any, alpha: float = 1) -> Value:
        if alpha != 1:
            other = self.binary("MUL", other, alpha)
        activation, last = self._activation(node)
        return self._as_last(last, self.binary("ADD", x, other, activation))

    @lowers(aten.sub)
    def _sub(self, node: Node, x: Any, other: Any, alpha: float = 1) -> Value:
        return self.binary("SUB", x, other if alpha == 1 else self.binary("MUL", other, alpha))

    @lowers(aten.mul)
    def _mul(self, node: Node, x: Any, other: Any) -> Value:
        return self.binary("MUL", x, other)

    @lowers(aten.div)
    def _div(self, node: Node, x: Any, other: Any) -> Value:
        return self.binary("DIV", x, other)

    @lowers(aten.maximum)
    def _maximum(self, node: Node, x: Any, other: Any) -> Value:
        return self.binary("MAXIMUM", x, other)

    @lowers(aten.minimum)
    def _minimum(self, node: Node, x: Any, other: Any) -> Value:
        return self.binary("MINIMUM", x, other)

    @lowers(aten.gelu)
    def _gelu(self, node: Node, x: Any, approximate: str = "none") -> Value:
        return self._unary("GELU", x, approximate=approximate == "tanh")

    @lowers(aten.leaky_relu)
    def _leaky_relu(self, node: Node, x: Any, negative_slope: float = 0.01) -> Value:
        return self._unary("LEAKY_RELU", x, alpha=negative_slope)

    @lowers(aten.silu)
    def _silu(self, node: Node, x: Any) -> Value:
        return self.binary("MUL", x, self._unary("LOGISTIC", x))

    @lowers(aten.hardsigmoid)
    def _hardsigmoid(self, node: Node, x: Any) -> Value:
        return self.binary("MUL", self.binary("ADD", x, 3.0, RELU6), 1 / 6)

    @lowers(aten.hardtanh, aten.clamp)
    def _hardtanh(self, node: Node, x: Any, **bounds: Any) -> Value:
        low, high = bounds.values()
        value = self.floats(x)
        if low is not None and low > -float("inf"):
            value = self.binary("MAXIMUM", value, float(low))
        if high is not None and high < float("inf"):
            value = self.binary("MINIMUM", value, float(high))
        return value

    @lowers(aten.clamp_min)
    def _clamp_min(self, node: Node, x: Any, min: Any) -> Value:
        return self.binary("MAXIMUM", x, min)

    @lowers(aten.pow)
    def _pow(self, node: Node, x: Any, exponent: Any) -> Value:
        if exponent != 2:
            raise UserError(f"found a power of {exponent}; accepted for LiteRT: 2")
        return self.binary("MUL", x, x)

    # Shapes.

    @lowers(aten.permute)
    def _permute(self, node: Node, x: Any, dims: Sequence[int]) -> Value:
        return self._turned(node, self.value(x), dims)

    def _turned(self, node: Node, value: Value, dims: Sequence[int]) -> Value:
        dims = [dimension % len(value.sizes) for dimension in dims]
        order = tuple(dims.index(dimension) for dimension in value.order)
        return replace(value, sizes=_sizes(node), order=order)

    @lowers(aten.transpose)
    def _transpose(self, node: Node, x: Any, dim0: int, dim1: int) -> Value:
        value = self.value(x)
        dims = [*range(len(value.sizes))]
        dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
        return self._turned(node, value, dims)

    @lowers(aten.cat)
    def _cat(self, node: Node, tensors: Sequence[Any], dim: int = 0) -> Value:
        values = [self.floats(tensor) for tensor in tensors]
        lead = next((value for value in values if value.order != identity(len(value.sizes))), values[0])
        inputs = [self.ordered(value, lead.order).tensor for value in values]
        [axis] = lead.axes([dim])
        return self.emit("CONCATENATION", inputs, _sizes(node), lead.order, axis=axis)

    def _part(self, value: Value, dimension: int, start: int, end: int, step: int = 1) -> Value:
        """Entries start, start + step ... below end of a dimension of a fixed size."""
        dimension %= len(value.sizes)
        size = value.sizes[dimension]
        if size < 0 and (start, step) == (0, 1) and end >= 2**31:
            return value
        if size < 0:
            raise UserError("found a part of the images of a batch; accepted: a network for which images are apart")
        start, end, _ = slice(start, end).indices(size)
        if (start, end, step) == (0, size, 1):
            return value
        [axis] = value.axes([dimension])
        rank = len(value.sizes)
        begins, ends, steps = [0] * rank, [0] * rank, [1] * rank
        begins[axis], ends[axis], steps[axis] = start, end, step
        sizes = list(value.sizes)
        sizes[dimension] = len(range(start, end, step))
        all_but = ((1 << rank) - 1) ^ (1 << axis)
        inputs = [value.tensor, *map(self._integers, (begins, ends, steps))]
        return self.emit(
            "STRIDED_SLICE",
            inputs,
            tuple(sizes),
            value.order,
            value.grid,
            beginMask=all_but,
            endMask=all_but,
        )

    @lowers(aten.slice)
    def _slice(self, node: Node, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
        return self._part(self.value(x), dim, start or 0, 2**63 - 1 if end is None else end, step)

    @lowers(aten.select)
    def _select(self, node: Node, x: Any, dim: int, index: int) -> Value:
        value = self.value(x)
        index %= value.sizes[dim]
        return self.reshaped(self._part(value, dim, index, index + 1), _sizes(node))

    @lowers(aten.split, aten.chunk, aten.split_with_sizes, aten.unbind)
    def _split(self, node: Node, x: Any, dim: int = 0, **_: Any) -> list[Value]:
        value, start, parts = self.value(x), 0, []
        for found in node.meta["val"]:
            sizes = _all_sizes(found)
            length = sizes[dim] if len(sizes) == len(value.sizes) else 1
            parts.append(self.reshaped(self._part(value, dim, start, start + length), sizes))
            start += length
        return parts

    @lowers(aten.expand)
    def _expand(self, node: Node, x: Any, **_: Any) -> Value:
        value, sizes = self.floats(x), _sizes(node)
        value = self._with_rank(value, len(sizes))
        if value.sizes == sizes:
            return value
        assert self.images is not None
        shape = [self._integers([max(size, 0)]) for size in sizes]
        if min(sizes) < -1:
            raise UserError(f"found an expansion to {sizes}; accepted: the number of images, not a multiple of it")
        if min(sizes) < 0:
            whole, batch = (self.file.tensor([count], "INT32") for count in (len(self.images.sizes), 1))
            self.file.operator("SHAPE", [self.images.tensor], [whole], outType=2)
            ends = [self._integers([number]) for number in (0, 1, 1)]
            self.file.operator("STRIDED_SLICE", [whole, *ends], [batch])
            shape = [batch if size < 0 else part for size, part in zip(sizes, shape, strict=True)]
        joined = self.file.tensor([len(sizes)], "INT32")
        self.file.operator("CONCATENATION", shape, [joined], axis=0)
        value = self.ordered(value)
        return self.emit("BROADCAST_TO", [value.tensor, joined], sizes)

    @lowers(aten.roll)
    def _roll(self, node: Node, x: Any, shifts: Sequence[int], dims: Sequence[int] = ()) -> Value:
        value = self.floats(x)
        for shift, dim in zip(shifts, dims, strict=True):
            size = value.sizes[dim]
            at = -shift % size
            if at:
                parts = [self._part(value, dim, at, size).tensor, self._part(value, dim, 0, at).tensor]
                [axis] = value.axes([dim])
                value = self.emit("CONCATENATION", parts, value.sizes, value.order, axis=axis)
        return value

    @lowers(aten.constant_pad_nd, aten.pad)
    def _pad(self, node: Node, x: Any, pad: Sequence[int], value: float | None = 0.0, mode: str = "constant") -> Any:
        if mode != "constant" or min(pad) < 0:
            raise UserError(f"found padding {mode} {[*pad]}; accepted for LiteRT: constant, and none that cuts off")
        if _is_span(node):
            found = self.values[x]
            before = found if isinstance(found, Ends) else Ends(self.value(x), -(len(pad) // 2), ())
            return replace(before, ends=(*before.ends, float(value or 0.0)))
        given = self.floats(x)
        pairs = [(0, 0)] * len(given.sizes)
        for index in range(len(pad) // 2):
            pairs[-1 - index] = pad[2 * index], pad[2 * index + 1]
        return self._padded(given, pairs, float(value or 0.0))

    def _padded(self, value: Value, pairs: Sequence[tuple[int, int]], filler: float = 0.0) -> Value:
        """`value` with so many fillers before and after it in each dimension; codes are filled with that of zero."""
        sizes = tuple(
            size if pair == (0, 0) else size + sum(pair) for size, pair in zip(value.sizes, pairs, strict=True)
        )
        stored = np.array([pairs[dimension] for dimension in value.order], np.int32)
        inputs = [value.tensor, self.file.constant(stored, "INT32")]
        if filler:
            inputs.append(self._numbers(np.array([filler])))
        return self.emit("PADV2" if filler else "PAD", inputs, sizes, value.order, value.grid)

    # Sums, means and norms.

    def _mean(self, value: Value, dimensions: Sequence[int], name: str = "MEAN") -> Value:
        """Over `dimensions`, which stay with a size of 1."""
        rank = len(value.sizes)
        gone = {dimension % rank for dimension in dimensions}
        sizes = tuple(1 if index in gone else size for index, size in enumerate(value.sizes))
        axes = self._integers(value.axes(dimensions))
        return self.emit(name, [value.tensor, axes], sizes, value.order, keepDims=True)

    @lowers(aten.mean, aten.amax, aten.sum)
    def _reduce(self, node: Node, x: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Value:
        value = self.floats(x)
        name = {aten.mean: "MEAN", aten.amax: "REDUCE_MAX", aten.sum: "SUM"}[_packet(node)]
        return self.reshaped(self._mean(value, dim or [*range(len(value.sizes))], name), _sizes(node))

    @lowers(aten.softmax)
    def _softmax(self, node: Node, x: Any, dim: int, **_: Any) -> Value:
        value = self.floats(x)
        if dim % len(value.sizes) != value.order[-1]:
            value = self.ordered(value, _with_last(value.order, dim % len(value.sizes)))
        return self.emit("SOFTMAX", [value.tensor], value.sizes, value.order, beta=1.0)

    def _normalised(self, value: Value, dimensions: Sequence[int], eps: float) -> Value:
        centred = self.binary("SUB", value, self._mean(value, dimensions))
        variance = self._mean(self.binary("MUL", centred, centred), dimensions)
        shifted = self.binary("ADD", variance, eps)
        return self.binary("MUL", centred, self.emit("RSQRT", [shifted.tensor], shifted.sizes, shifted.order))

    def _affine(self, value: Value, weight: Any, bias: Any, sizes: Sequence[int]) -> Value:
        """weight * value + bias, both in these sizes; None for either leaves it out."""
        for name, parameter in (("MUL", weight), ("ADD", bias)):
            if parameter is not None:
                found = self.values[parameter] if isinstance(parameter, Node) else parameter
                value = self.binary(name, value, found.detach().reshape(sizes))
        return value

    @lowers(aten.layer_norm)
    def _layer_norm(
        self,
        node: Node,
        input: Any,
        normalized_shape: Any,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
        **_: Any,
    ) -> Value:
        dimensions = [-1 - index for index in range(len(normalized_shape))]
        value = self._normalised(self.floats(input), dimensions, eps)
        return self._affine(value, weight, bias, normalized_shape)

    @lowers(aten.group_norm)
    def _group_norm(
        self, node: Node, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, **_: Any
    ) -> Value:
        value = self.floats(input)
        batch, channels, *rest = value.sizes
        inner = int(np.prod(rest, dtype=int)) * channels // num_groups
        grouped = self.reshaped(value, (batch, num_groups, inner))
        value = self.reshaped(self._normalised(grouped, [-1], eps), value.sizes)
        return self._affine(value, weight, bias, [channels, *[1] * len(rest)])

    @lowers(aten._native_batch_norm_legit_no_training)
    def _batch_norm(
        self, node: Node, input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, eps: float, **_: Any
    ) -> list[Value]:
        mean, variance = (self.values[one].detach().double() for one in (running_mean, running_var))
        gain = (variance + eps).rsqrt()
        if weight is not None:
            gain = gain * self.values[weight].detach().double()
        shift = -mean * gain
        if bias is not None:
            shift = shift + self.values[bias].detach().double()
        value = self.floats(input)
        sizes = [len(gain), *[1] * (len(value.sizes) - 2)]
        return [self._affine(value, gain.float(), shift.float(), sizes)]

    # Pictures.

    @lowers(aten.adaptive_avg_pool2d)
    def _adaptive_avg_pool2d(self, node: Node, x: Any, output_size: Sequence[int]) -> Value:
        value = self.floats(x)
        height, width = value.sizes[2:]
        if tuple(output_size) == (1, 1):
            return self._mean(value, [2, 3])
        if height % output_size[0] or width % output_size[1]:
            raise UserError(f"found {height}x{width} pooled to {[*output_size]}; accepted for LiteRT: a divisor of it")
        size = [height // output_size[0], width // output_size[1]]
        return self._pool("AVERAGE_POOL_2D", value, _sizes(node), size, size, PADDING_VALID)

    @lowers(aten.max_pool2d)
    def _max_pool2d(
        self, node: Node, x: Any, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, **_: Any
    ) -> Value:
        value, size = self.value(x), _pair(kernel_size)
        if _pair(dilation) != [1, 1]:
            raise UserError(f"found max_pool2d with dilation {dilation}; accepted for LiteRT: 1")
        if size == [1, 1] == _pair(stride or size):
            return value
        around = _around(value.sizes, _sizes(node), size, _pair(stride or size), _pair(padding), [1, 1])
        scheme = _scheme(value.sizes, _sizes(node), size, _pair(stride or size), [1, 1], around)
        if scheme is None:
            value = self._padded(self.floats(value), [(0, 0), (0, 0), *around], float(np.finfo(np.float32).min))
        return self._pool(
            "MAX_POOL_2D", value, _sizes(node), size, _pair(stride or size), PADDING_VALID if scheme is None else scheme
        )

    @lowers(aten.avg_pool2d)
    def _avg_pool2d(
        self,
        node: Node,
        x: Any,
        kernel_size: Any,
        stride: Any = (),
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: Any = None,
    ) -> Value:
        value, size, sizes = self.floats(x), _pair(kernel_size), _sizes(node)
        step, given = _pair(stride or size), _pair(padding)
        around = _around(value.sizes, sizes, size, step, given, [1, 1])
        scheme = _scheme(value.sizes, sizes, size, step, [1, 1], around)
        counted = count_include_pad and given != [0, 0]
        if divisor_override or (counted and ceil_mode) or (not counted and scheme is None):
            raise UserError("found avg_pool2d with another divisor than LiteRT's; accepted: its padding, or zeros")
        if counted:
            value, scheme = self._padded(value, [(0, 0), (0, 0), *around]), PADDING_VALID
        return self._pool("AVERAGE_POOL_2D", value, sizes, size, step, PADDING_VALID if scheme is None else scheme)

    def _pool(
        self, name: str, value: Value, sizes: tuple[int, ...], size: Sequence[int], step: Sequence[int], padding: int
    ) -> Value:
        options = {
            "padding": padding,
            "strideH": step[0],
            "strideW": step[1],
            "filterHeight": size[0],
            "filterWidth": size[1],
        }
        value = self.ordered(value, CHANNELS_LAST)
        return self.emit(name, [value.tensor], sizes, CHANNELS_LAST, value.grid, **options)

    # Layers.

    @lowers(aten.conv2d)
    def _conv2d(
        self,
        node: Node,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Value:
        value, sizes = self._input(node, input), _sizes(node)
        channels = value.sizes[1]
        _, _, *size = _weight_sizes(self.values[weight])
        step, spread = _pair(stride), _pair(dilation)
        if isinstance(padding, str):
            over = [(length - 1) * gap if padding == "same" else 0 for length, gap in zip(size, spread, strict=True)]
            around = [(total // 2, total - total // 2) for total in over]
        else:
            around = _around(value.sizes, sizes, size, step, _pair(padding), spread)
        scheme = _scheme(value.sizes, sizes, size, step, spread, around)
        if scheme is None:
            value, scheme = self._padded(value, [(0, 0), (0, 0), *around]), PADDING_VALID
        value = self.ordered(value, CHANNELS_LAST)
        options = {"padding": scheme, "strideH": step[0], "strideW": step[1]}
        options |= {"dilationHFactor": spread[0], "dilationWFactor": spread[1]}
        layer = Layer("CONV_2D", options, (0, 2, 3, 1), sizes, CHANNELS_LAST)
        if groups == channels and groups > 1:
            options["depthMultiplier"] = sizes[1] // channels
            layer = replace(layer, name="DEPTHWISE_CONV_2D", layout=(1, 2, 3, 0))
        return self._layer(node, layer, value, weight, bias)

    @lowers(aten.linear)
    def _linear(self, node: Node, input: Any, weight: Any, bias: Any = None) -> Value:
        value, sizes = self._input(node, input), _sizes(node)
        last = len(sizes) - 1
        if value.order[-1] != last:
            value = self.ordered(value, _with_last(value.order, last))
        options = {"keepNumDims": len(sizes) > 2, "asymmetricQuantizeInputs": isinstance(self.values[input], Spanned)}
        layer = Layer("FULLY_CONNECTED", options, (0, 1), sizes, value.order)
        return self._layer(node, layer, value, weight, bias)

    def _input(self, node: Node, source: Node) -> Value:
        """The input of a layer: codes where its kernel reads these, and floats elsewhere."""
        found = self.values[source]
        if isinstance(found, Spanned):
            return found.value
        value = self.value(source)
        return value if self._codes_behind(node) is not None and value.grid is not None else self.floats(value)

    def _layer(self, node: Node, layer: Layer, value: Value, weight: Node, bias: Node | None) -> Value:
        """The output of a layer on `value`, with the activation behind it."""
        held, source = self.values[weight], self.values[_arguments(node)["input"]]
        shift = np.zeros(_weight_sizes(held)[0]) if bias is None else self.values[bias].detach().double().numpy()
        behind = self._codes_behind(node)
        if isinstance(held, Weight) and value.grid is not None and behind is not None:
            return self._written(layer, value, value.grid, held, shift, behind)
        on_grid = isinstance(source, Spanned) or (isinstance(source, Value) and source.grid is not None)
        weights = self._stored(held, layer, on_grid)
        if isinstance(held, Weight) and not isinstance(source, Spanned):
            weights = self.emit("DEQUANTIZE", [weights], self._layout(held.codes, layer).shape).tensor
        activation, last = self._activation(node)
        inputs = [value.tensor, weights, self._numbers(shift)]
        options = layer.options | {"fusedActivationFunction": activation}
        return self._as_last(last, self.emit(layer.name, inputs, layer.sizes, layer.order, **options))

    def _stored(self, held: Any, layer: Layer, wide: bool) -> int:
        """The constant with a weight, floats or codes, as the operator of `layer` wants it.

        wide: codes have 8 bits in any case, as integer kernels are fast with these alone.
        """
        if not isinstance(held, Weight):
            return self._numbers(self._layout(held, layer))
        codes, kind = held.codes, "INT8"
        grid = replace(held.grid, dimension=layer.layout.index(0))
        shift = (codes.flatten(1).amax(1) - HIGHEST_OF_4).clamp(min=0)
        shifted = codes - shift.reshape(-1, *[1] * (codes.dim() - 1))
        if not wide and int(shifted.min()) >= -HIGHEST_OF_4 - 1:
            codes, kind, grid = shifted, "INT4", replace(grid, zero_point=(-shift).tolist())
        return self.file.constant(self._layout(codes, layer), kind, grid)

    def _layout(self, weight: Tensor, layer: Layer) -> np.ndarray:
        values = weight.detach().permute(layer.layout).contiguous().numpy()
        return values.reshape(1, *values.shape[1:3], -1) if layer.name == "DEPTHWISE_CONV_2D" else values

    def _written(
        self,
        layer: Layer,
        value: Value,
        input_grid: Quantization,
        held: Weight,
        shift: np.ndarray,
        behind: tuple[list[Node], Node],
    ) -> Value:
        """The layer as an operator that writes codes, with the range that is cut out `behind` it."""
        between, quantize = behind
        low, high = -float("inf"), float("inf")
        for one in between:
            bounds = _bounds(one)
            low, high = max(low, bounds[0]), min(high, bounds[1])
        scale, zero_point = _arguments(quantize)["scale"], _arguments(quantize)["zero_point"]
        activation = ACTIVATIONS.get((low, high), RELU if low == 0 else NO_ACTIVATION)
        if (low, high) not in ACTIVATIONS and np.isfinite(high):
            # An int8 cuts off at its own end, which is where the highest code is moved to.
            zero_point = HIGHEST - round(high / scale)
        grid = Quantization([scale], [zero_point])
        sums = np.float64(np.float32(input_grid.scale[0])) * np.array(held.grid.scale, np.float32).astype(np.float64)
        codes = np.rint(shift / sums).astype(np.int32)
        bias = self.file.constant(codes, "INT32", Quantization(sums.tolist(), [0] * len(sums)))
        options = layer.options | {"fusedActivationFunction": activation}
        inputs = [value.tensor, self._stored(held, layer, True), bias]
        result = self.emit(layer.name, inputs, layer.sizes, layer.order, grid, **options)
        if activation == NO_ACTIVATION and np.isfinite(low):
            lowest = self.file.constant(np.array([round(low / scale) + zero_point], np.int8), "INT8", grid)
            result = self.emit("MAXIMUM", [result.tensor, lowest], layer.sizes, layer.order, grid)
        for one in (*between, quantize):
            self.values[one] = result
        return result

    def _codes_behind(self, node: Node) -> tuple[list[Node], Node] | None:
        """What cuts off the output of a layer, and what quantizes it, if nothing else reads that output."""
        operators = torch.ops.quantized_decomposed
        between: list[Node] = []
        last = node
        while len(last.users) == 1:
            [user] = last.users
            if user.target is operators.quantize_per_tensor.default:
                return between, user
            if _packet(user) not in RANGES:
                return None
            between.append(user)
            last = user
        return None

    def _activation(self, node: Node) -> tuple[int, Node]:
        """The activation that an operator can apply itself, and the last node that it then stands for."""
        if len(node.users) == 1:
            [user] = node.users
            if _packet(user) in RANGES and _bounds(user) in ACTIVATIONS:
                return ACTIVATIONS[_bounds(user)], user
        return NO_ACTIVATION, node

    def _as_last(self, last: Node, value: Value) -> Value:
        self.values[last] = value
        return value

    @lowers(aten.matmul, aten.bmm)
    def _matmul(self, node: Node, x: Any, **rest: Any) -> Value:
        [other] = rest.values()
        return self._product(self.floats(x), self.floats(other), _sizes(node))

    def _product(self, one: Value, other: Value, sizes: tuple[int, ...], turned: bool = False) -> Value:
        rank = len(sizes)
        pair = [self.ordered(self._with_rank(value, rank)).tensor for value in (one, other)]
        return self.emit("BATCH_MATMUL", pair, sizes, adjY=turned)

    @lowers(aten.scaled_dot_product_attention)
    def _attention(
        self, node: Node, query: Any, key: Any, value: Any, attn_mask: Any = None, scale: Any = None, **rest: Any
    ) -> Value:
        if rest.get("is_causal") or rest.get("enable_gqa"):
            raise UserError("found attention with is_causal or enable_gqa; accepted for LiteRT: a mask or none")
        queries, keys = self.floats(query), self.floats(key)
        scale = queries.sizes[-1] ** -0.5 if scale is None else scale
        scaled = self.binary("MUL", queries, float(scale))
        weights = self._product(scaled, keys, (*queries.sizes[:-1], keys.sizes[-2]), turned=True)
        if attn_mask is not None:
            weights = self.binary("ADD", weights, attn_mask)
        shares = self.emit("SOFTMAX", [weights.tensor], weights.sizes, weights.order, beta=1.0)
        return self._product(shares, self.floats(value), _sizes(node))

    # Grids.

    @lowers(torch.ops.quantized_decomposed.quantize_per_tensor)
    def _quantize(self, node: Node, input: Any, scale: Any, zero_point: Any, **_: Any) -> Any:
        found = self.values[input]
        if isinstance(scale, Node):
            return found
        grid = Quantization([scale], [zero_point])
        if isinstance(found, Ends):
            return replace(found, value=self._codes(found.value, grid))
        return self._codes(self.value(input), grid)

    def _codes(self, value: Value, grid: Quantization) -> Value:
        key = value.tensor, repr(grid)
        if value.grid == grid:
            return value
        if key not in self._rounded:
            given = self.floats(value)
            self._rounded[key] = self.emit("QUANTIZE", [given.tensor], given.sizes, given.order, grid)
        return self._rounded[key]

    @lowers(torch.ops.quantized_decomposed.dequantize_per_tensor)
    def _dequantize(self, node: Node, input: Any, scale: Any, zero_point: Any, **_: Any) -> Any:
        found = self.values[input]
        return Spanned(self._with_ends(found)) if isinstance(found, Ends) and isinstance(scale, Node) else found

    def _with_ends(self, given: Ends) -> Value:
        """Channels of zeros first, and then the ends added to these: XNNPACK has no padding with other numbers."""
        value, rank = self.floats(given.value), len(given.value.sizes)
        dimension, count = given.dimension % rank, len(given.ends)
        last = CHANNELS_LAST if rank == 4 and dimension == 1 else _with_last(value.order, dimension)
        pairs = [(0, count if one == dimension else 0) for one in range(rank)]
        padded = self._padded(self.ordered(value, last), pairs)
        ends = torch.zeros(padded.sizes[dimension])
        ends[-count:] = torch.tensor(given.ends)
        return self.binary("ADD", padded, ends.reshape(-1, *[1] * (rank - 1 - dimension)))

    @lowers(torch.ops.quantized_decomposed.choose_qparams)
    def _choose(self, node: Node, input: Any, **_: Any) -> list[None]:
        return [None, None]

    @lowers(torch.ops.quantized_decomposed.dequantize_per_channel)
    def _weight(self, node: Node, input: Any, scales: Any, zero_points: Any, **_: Any) -> Weight:
        scale, zero_point = (self.values[one].tolist() for one in (scales, zero_points))
        return Weight(self.values[input], Quantization(scale, zero_point))


def identity(rank: int) -> tuple[int, ...]:
    return tuple(range(rank))


def _packet(node: Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def _arguments(node: Node) -> dict[str, Any]:
    """The arguments of `node` by their names, with the defaults of its operator; `self` is called x."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)} | node.kwargs
    found = {argument.name: given.get(argument.name, argument.default_value) for argument in schema}
    return {"x" if name == "self" else name: value for name, value in found.items()}


def _filled(arguments: Any, values: dict[Node, Any]) -> Any:
    return torch.fx.node.map_arg(arguments, lambda node: values[node])


def _sizes(node: Node) -> tuple[int, ...]:
    return _all_sizes(node.meta["val"])


def _all_sizes(tensor: Tensor) -> tuple[int, ...]:
    """The sizes of a tensor of torch.export; k times the number of images is -k."""
    return tuple(map(_size, tensor.shape))


def _size(size: Any) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    [images] = expression.free_symbols
    factor = expression / images
    if not factor.is_Integer:
        raise UserError(f"found a size of {expression} for {images} images; accepted: a multiple of their number")
    return -int(factor)


def _varies(node: Node) -> bool:
    """Whether the result of `node` has the number of images in its sizes."""
    found = node.meta.get("val")
    tensors = found if isinstance(found, list | tuple) else [found]
    return any(not isinstance(size, int) for tensor in tensors if isinstance(tensor, Tensor) for size in tensor.shape)


def _is_number(found: Any) -> bool:
    return isinstance(found, int | float)


def _shape(operand: Value | Tensor) -> tuple[int, ...]:
    return tuple(operand.shape) if isinstance(operand, Tensor) else operand.sizes


def _is_span(node: Node) -> bool:
    """Whether `node` pads a tensor with the ends of its grid, as `compress.export.xnnpack_graph` does."""
    operators = torch.ops.quantized_decomposed
    steps = iter((operators.quantize_per_tensor.default, operators.dequantize_per_tensor.default))
    while len(node.users) == 1:
        [node] = node.users
        if node.target is not aten.constant_pad_nd.default and node.target is not next(steps, None):
            return False
    return any(user.target is operators.choose_qparams.tensor for user in node.users)


def _broadcast(one: int, other: int) -> int:
    return other if one == 1 else one


def _with_last(order: tuple[int, ...], dimension: int) -> tuple[int, ...]:
    return (*(one for one in order if one != dimension), dimension)


def _moves_nothing(value: Value, order: tuple[int, ...]) -> bool:
    """Whether `value` in that order is the same numbers one after the other."""
    before, after = ([one for one in dimensions if value.sizes[one] != 1] for dimensions in (value.order, order))
    return before == after


def _pair(numbers: Any) -> list[int]:
    given = [numbers] if isinstance(numbers, int) else [*numbers]
    return given * 2 if len(given) == 1 else given


def _around(
    sizes: Sequence[int],
    outputs: Sequence[int],
    size: Sequence[int],
    step: Sequence[int],
    padding: Sequence[int],
    spread: Sequence[int],
) -> list[tuple[int, int]]:
    """The padding before and after the height and the width that an operator reads, at least none."""
    return [
        (
            before,
            max((outputs[2 + one] - 1) * step[one] + (size[one] - 1) * spread[one] + 1 - sizes[2 + one] - before, 0),
        )
        for one, before in enumerate(padding)
    ]


def _scheme(
    sizes: Sequence[int],
    outputs: Sequence[int],
    size: Sequence[int],
    step: Sequence[int],
    spread: Sequence[int],
    around: Sequence[tuple[int, int]],
) -> int | None:
    """The padding of LiteRT which is `around`, if one is.

    SAME has ceil(size / step) outputs and what these need, the larger half of it behind (schema.fbs).
    """
    if all(pair == (0, 0) for pair in around):
        return PADDING_VALID
    for one, pair in enumerate(around):
        length, count = sizes[2 + one], -(-sizes[2 + one] // step[one])
        total = max((count - 1) * step[one] + (size[one] - 1) * spread[one] + 1 - length, 0)
        if outputs[2 + one] != count or pair != (total // 2, total - total // 2):
            return None
    return PADDING_SAME


def _bounds(node: Node) -> tuple[float, float]:
    """The range that an activation of RANGES cuts out."""
    bounds = (*node.args[1:], *RANGES[_packet(node)][len(node.args) - 1 :])
    return float(bounds[0]), float(bounds[1])  # type: ignore[arg-type]


def _weight_sizes(held: Any) -> tuple[int, ...]:
    return tuple(held.codes.shape if isinstance(held, Weight) else held.shape)
