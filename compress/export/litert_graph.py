"""Turns the ATen graph of a network into operators of LiteRT, one by one, with the integers that the graph has.

The graph is torch.export's, of a float network or what `compress.export.xnnpack_graph` made of a quantized one.
Here are the walk through it and the layers: norms, pooling, convolutions, linear ones, attention, and their grids. What
computes element by element is in `compress.export.litert_elements`.

A layer whose output the graph quantizes becomes an int8 operator; one on grids of their own for each image an operator
with float inputs and int8 weights, which LiteRT quantizes the inputs of, onto the grid that the graph has made sure of.
Any other integer weight is dequantized when the file is loaded. The operators: `schema.fbs` of LiteRT, and
ai.google.dev/edge/litert/conversion/tensorflow/quantization/quantization_spec.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from compress.errors import UserError
from compress.export.litert_elements import (
    ACTIVATIONS,
    LOWERINGS,
    NO_ACTIVATION,
    RELU,
    RESHAPES,
    UNARY,
    ElementWriter,
    Ends,
    Value,
    Weight,
    arguments_of,
    bounds_of,
    identity,
    lowers,
    packet_of,
    sizes_of,
)
from compress.export.litert_file import GraphFile, Quantization
from compress.export.xnnpack_graph import HIGHEST, RANGES

aten = torch.ops.aten
CHANNELS_LAST = (0, 2, 3, 1)
HIGHEST_OF_4 = 7  # of an int4
PADDING_SAME, PADDING_VALID = 0, 1  # schema.fbs
SAME = {aten.alias, aten.clone, aten.contiguous, aten.detach, aten.dropout, aten.lift_fresh_copy, aten._to_copy}


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


class _Writer(ElementWriter):
    def written(self) -> tuple[int, int]:
        logits = -1
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                sizes = sizes_of(node)
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
        packet = packet_of(node)
        if packet is operator.getitem:
            source, index = node.args
            return self.values[source][index]  # type: ignore[index]
        if packet is aten.sym_size or not isinstance(node.target, torch._ops.OpOverload):
            return None  # sizes, which are read off the metadata
        arguments = arguments_of(node)
        known = [self.values.get(one) for one in node.all_input_nodes]
        constant = all(isinstance(one, Tensor) for one in known) and not _varies(node)
        if constant and packet is not torch.ops.quantized_decomposed.dequantize_per_channel:
            return node.target(*_filled(node.args, self.values), **_filled(node.kwargs, self.values))
        if packet in SAME:
            return self.values[arguments["x"]]
        if packet in UNARY:
            return self._unary(UNARY[packet], arguments["x"])
        if packet in RESHAPES:
            return self.reshaped(self.value(arguments["x"]), sizes_of(node))
        if packet not in LOWERINGS:
            raise UserError(f"found {packet}, which is not written for LiteRT; accepted: export=onnx or openvino")
        return LOWERINGS[packet](self, node, **arguments)

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
        name = {aten.mean: "MEAN", aten.amax: "REDUCE_MAX", aten.sum: "SUM"}[packet_of(node)]
        return self.reshaped(self._mean(value, dim or [*range(len(value.sizes))], name), sizes_of(node))

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
        return self._pool("AVERAGE_POOL_2D", value, sizes_of(node), size, size, PADDING_VALID)

    @lowers(aten.max_pool2d)
    def _max_pool2d(
        self, node: Node, x: Any, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, **_: Any
    ) -> Value:
        value, size = self.value(x), _pair(kernel_size)
        if _pair(dilation) != [1, 1]:
            raise UserError(f"found max_pool2d with dilation {dilation}; accepted for LiteRT: 1")
        if size == [1, 1] == _pair(stride or size):
            return value
        around = _around(value.sizes, sizes_of(node), size, _pair(stride or size), _pair(padding), [1, 1])
        scheme = _scheme(value.sizes, sizes_of(node), size, _pair(stride or size), [1, 1], around)
        if scheme is None:
            value = self._padded(self.floats(value), [(0, 0), (0, 0), *around], float(np.finfo(np.float32).min))
        return self._pool(
            "MAX_POOL_2D",
            value,
            sizes_of(node),
            size,
            _pair(stride or size),
            PADDING_VALID if scheme is None else scheme,
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
        value, size, sizes = self.floats(x), _pair(kernel_size), sizes_of(node)
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
        value, sizes = self._input(node, input), sizes_of(node)
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
        value, sizes = self._input(node, input), sizes_of(node)
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
        held, source = self.values[weight], self.values[arguments_of(node)["input"]]
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
            bounds = bounds_of(one)
            low, high = max(low, bounds[0]), min(high, bounds[1])
        scale, zero_point = arguments_of(quantize)["scale"], arguments_of(quantize)["zero_point"]
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
            if packet_of(user) not in RANGES:
                return None
            between.append(user)
            last = user
        return None

    @lowers(aten.matmul, aten.bmm)
    def _matmul(self, node: Node, x: Any, **rest: Any) -> Value:
        [other] = rest.values()
        return self._product(self.floats(x), self.floats(other), sizes_of(node))

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
        return self._product(shares, self.floats(value), sizes_of(node))

    # Grids.

    @lowers(torch.ops.quantized_decomposed.quantize_per_tensor)
    def _quantize(self, node: Node, input: Any, scale: Any, zero_point: Any, **_: Any) -> Any:
        found = self.values[input]
        if isinstance(scale, Node):
            return found
        grid = Quantization([scale], [zero_point])
        if isinstance(found, Ends):
            return replace(found, value=self.codes(found.value, grid))
        return self.codes(self.value(input), grid)

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


def _filled(arguments: Any, values: dict[Node, Any]) -> Any:
    return torch.fx.node.map_arg(arguments, lambda node: values[node])


def _varies(node: Node) -> bool:
    """Whether the result of `node` has the number of images in its sizes."""
    found = node.meta.get("val")
    tensors = found if isinstance(found, list | tuple) else [found]
    return any(not isinstance(size, int) for tensor in tensors if isinstance(tensor, Tensor) for size in tensor.shape)


def _with_last(order: tuple[int, ...], dimension: int) -> tuple[int, ...]:
    return (*(one for one in order if one != dimension), dimension)


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


def _weight_sizes(held: Any) -> tuple[int, ...]:
    return tuple(held.codes.shape if isinstance(held, Weight) else held.shape)
