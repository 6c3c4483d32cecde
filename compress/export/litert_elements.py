"""Operators of LiteRT that compute element by element or move elements, and the values that they read and write.

Each tensor has an order in which its dimensions are stored. It is handed on by what computes element by element, and a
TRANSPOSE is written only where an operator needs another one. `compress.export.litert_graph` walks a graph with these
and has the layers. The operators: `schema.fbs` of LiteRT.
"""

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
from compress.export.xnnpack_graph import RANGES

aten = torch.ops.aten
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


def lowers(*packets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks the method that writes these operators of ATen; it gets the node and the arguments by their names."""

    def mark(method: Callable[..., Any]) -> Callable[..., Any]:
        LOWERINGS.update(dict.fromkeys(packets, method))
        return method

    return mark


class ElementWriter:
    """The operators of `module`, a graph of torch.export, that are written to `file` so far, and what they compute."""

    def __init__(self, module: GraphModule, file: GraphFile) -> None:
        self.module, self.file = module, file
        # What is computed from parameters and buffers alone is a Tensor.
        self.values: dict[Node, Any] = {}
        self.images: Value | None = None
        self._floats: dict[int, Value] = {}
        self._rounded: dict[tuple[int, str], Value] = {}
        self._orders: dict[tuple[int, tuple[int, ...]], Value] = {}

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

    def codes(self, value: Value, grid: Quantization) -> Value:
        key = value.tensor, repr(grid)
        if value.grid == grid:
            return value
        if key not in self._rounded:
            given = self.floats(value)
            self._rounded[key] = self.emit("QUANTIZE", [given.tensor], given.sizes, given.order, grid)
        return self._rounded[key]

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

    def _activation(self, node: Node) -> tuple[int, Node]:
        """The activation that an operator can apply itself, and the last node that it then stands for."""
        if len(node.users) == 1:
            [user] = node.users
            if packet_of(user) in RANGES and bounds_of(user) in ACTIVATIONS:
                return ACTIVATIONS[bounds_of(user)], user
        return NO_ACTIVATION, node

    def _as_last(self, last: Node, value: Value) -> Value:
        self.values[last] = value
        return value

    # Shapes.

    @lowers(aten.permute)
    def _permute(self, node: Node, x: Any, dims: Sequence[int]) -> Value:
        return self._turned(node, self.value(x), dims)

    def _turned(self, node: Node, value: Value, dims: Sequence[int]) -> Value:
        dims = [dimension % len(value.sizes) for dimension in dims]
        order = tuple(dims.index(dimension) for dimension in value.order)
        return replace(value, sizes=sizes_of(node), order=order)

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
        return self.emit("CONCATENATION", inputs, sizes_of(node), lead.order, axis=axis)

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
        return self.reshaped(self._part(value, dim, index, index + 1), sizes_of(node))

    @lowers(aten.split, aten.chunk, aten.split_with_sizes, aten.unbind)
    def _split(self, node: Node, x: Any, dim: int = 0, **_: Any) -> list[Value]:
        value, start, parts = self.value(x), 0, []
        for found in node.meta["val"]:
            sizes = sizes_of_tensor(found)
            length = sizes[dim] if len(sizes) == len(value.sizes) else 1
            parts.append(self.reshaped(self._part(value, dim, start, start + length), sizes))
            start += length
        return parts

    @lowers(aten.expand)
    def _expand(self, node: Node, x: Any, **_: Any) -> Value:
        value, sizes = self.floats(x), sizes_of(node)
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


def identity(rank: int) -> tuple[int, ...]:
    return tuple(range(rank))


def packet_of(node: Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def arguments_of(node: Node) -> dict[str, Any]:
    """The arguments of `node` by their names, with the defaults of its operator; `self` is called x."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)} | node.kwargs
    found = {argument.name: given.get(argument.name, argument.default_value) for argument in schema}
    return {"x" if name == "self" else name: value for name, value in found.items()}


def sizes_of(node: Node) -> tuple[int, ...]:
    return sizes_of_tensor(node.meta["val"])


def sizes_of_tensor(tensor: Tensor) -> tuple[int, ...]:
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


def _moves_nothing(value: Value, order: tuple[int, ...]) -> bool:
    """Whether `value` in that order is the same numbers one after the other."""
    before, after = ([one for one in dimensions if value.sizes[one] != 1] for dimensions in (value.order, order))
    return before == after


def bounds_of(node: Node) -> tuple[float, float]:
    """The range that an activation of RANGES cuts out."""
    bounds = (*node.args[1:], *RANGES[packet_of(node)][len(node.args) - 1 :])
    return float(bounds[0]), float(bounds[1])  # type: ignore[arg-type]
