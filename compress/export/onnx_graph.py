"""Rewrites the ONNX graph of a float network into the integers of a quantized one.

A weight is an INT2 (1 and 2 bits), INT4 (3 and 4 bits) or INT8 initializer and a DequantizeLinear per output channel;
both its codes and its zero points are stored less `levels // 2`, so symmetric grids have zero points 0. A layer whose
input is quantized as well gets QuantizeLinear and DequantizeLinear in front of it, which runtimes fuse with the layer
into integer kernels. For a runtime that lacks some of this, `Containers` asks for wider types and zero points of 0.
Operators: onnx.ai/onnx/operators; what ONNX Runtime fuses: onnxruntime.ai, "Quantize ONNX models".
"""

import ast
from collections.abc import Callable, Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from torch import nn
from torch.fx import GraphModule, Node

from compress.errors import UserError
from compress.export.onnx_editor import GraphEditor
from compress.export.onnx_file import Containers
from compress.models.masks import weight_of
from compress.quantization.activations import InputQuantizer, input_quantizers
from compress.quantization.quantized import QuantizedLayer, QuantizedModel

# Bits of a weight: type of the initializer, and the first opset whose DequantizeLinear reads it.
STORAGE = {
    2: (TensorProto.INT2, 25),
    4: (TensorProto.INT4, 21),
    8: (TensorProto.INT8, 18),
    16: (TensorProto.INT16, 21),
}
LARGEST = 2**31 - 1
SCOPES = "pkg.torch.onnx.name_scopes"  # where torch's exporter notes which module a node comes from


def storage(levels: int, narrowest: int = 2) -> tuple[int, int]:
    """(type of the initializer, opset) for weights on `levels` levels, of `narrowest` bits at least.

    Raises UserError for more than 2^16 levels.
    """
    for bits, types in STORAGE.items():
        if bits >= narrowest and levels <= 2**bits:
            return types
    raise UserError(f"levels: found a weight on {levels}; accepted in an ONNX file: at most 65536, or 16 bits")


def quantize_graph(model: ModelProto, quantized: QuantizedModel, containers: Containers) -> None:
    """Puts the codes of `quantized` in place of the float weights in `model`, and its input grids before their readers.

    `model` is what torch exported of `quantized.model` without its input quantizers, node metadata included. Raises
    UserError where the exporter changed a layer beyond recognition.
    """
    editor = GraphEditor(model)
    inputs = input_quantizers(quantized.model)
    layers = quantized.layers | {name: quantized.layers[holder] for name, holder in quantized.tied.items()}
    waiting = set(layers) | set(inputs)
    known = set(waiting)
    done: dict[str, list[str]] = {}
    for node in list(model.graph.node):
        name = _layer_of(node)
        if node.op_type in ("Conv", "Gemm", "MatMul") and name in known:
            waiting.discard(name)
            weight = weight_of(quantized.model.get_submodule(name)).detach().cpu().numpy()
            turned = _check_weight(name, node, editor, weight)
            if name in inputs:
                quantizer = inputs[name]
                grid = float(quantizer.scale), int(quantizer.zero_point), quantizer.levels
                node.input[0] = editor.quantized(node.input[0], *grid)
            if name in done:
                node.input[1:] = done[name]
            elif name in layers:
                holder = quantized.tied.get(name, name)
                _quantize_weight(name, holder, node, editor, layers[name], inputs.get(name), turned, containers)
                done[name] = list(node.input[1:])
        editor.nodes.append(node)
    waiting -= _constant_layers(quantized.model)
    if waiting:
        raise UserError(f"{min(waiting)}: torch.onnx exported no Conv, Gemm or MatMul for this layer")
    editor.finish()


def quantize_additions(
    model: ModelProto, ranges: Callable[[ModelProto, list[str]], Mapping[str, tuple[float, float]]]
) -> None:
    """8-bit grids for both inputs of every addition that a convolution on quantized inputs flows into.

    Without them the convolutions before a residual addition have float outputs, and no integer kernel is used for
    them. ranges(model, tensors) gives the (lowest, highest) value of each; zero is put into the range. A tensor that
    already has an 8-bit grid, as the input of the next layer, keeps that one.
    """
    producers = {output: node for node in model.graph.node for output in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}

    def is_integer(tensor: str) -> bool:
        node = producers.get(tensor)
        source = producers.get(node.input[0]) if node is not None and node.op_type == "Conv" else None
        return source is not None and source.op_type == "DequantizeLinear"

    additions = [
        node
        for node in model.graph.node
        if node.op_type == "Add" and not constants & set(node.input) and any(map(is_integer, node.input))
    ]
    # Behind a Clip there are fewer than 256 levels, too few for a sum.
    grids = {
        producers[node.input[0]].input[0]: node.output[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0] in producers
        and producers[node.input[0]].op_type == "QuantizeLinear"
    }
    missing = sorted({tensor for node in additions for tensor in node.input} - set(grids))
    measured = ranges(model, missing) if missing else {}
    added = {id(node) for node in additions}
    editor = GraphEditor(model)
    for node in list(model.graph.node):
        if id(node) in added:
            for index, tensor in enumerate(node.input):
                if tensor not in grids:
                    low, high = min(0.0, measured[tensor][0]), max(0.0, measured[tensor][1])
                    scale = (high - low) / 255 or 1.0
                    node.input[index] = editor.quantized(tensor, scale, min(255, round(-low / scale)))
                else:
                    node.input[index] = grids[tensor]
        editor.nodes.append(node)
    editor.finish()


def _constant_layers(network: nn.Module) -> set[str]:
    """The layers that see nothing of the images, whose outputs, of the quantized weights, the exporter has computed."""
    if not isinstance(network, GraphModule):
        return set()
    of_images: set[Node] = set()
    constant = set()
    for node in network.graph.nodes:
        if node.op == "placeholder" or of_images & {*node.all_input_nodes}:
            of_images.add(node)
        elif node.op == "call_module":
            constant.add(node.target)
    return constant


def _layer_of(node: NodeProto) -> str | None:
    """The name of the module whose forward became `node`."""
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            names: list[str | None] = [None, *ast.literal_eval(entry.value)]
            return names[-2]
    return None


def _check_weight(name: str, node: NodeProto, editor: GraphEditor, weight: np.ndarray) -> bool:
    """Whether `node` reads the (N, d) `weight` of its layer turned around, as (d, N); UserError for another weight."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    turned = node.op_type == "MatMul" or (node.op_type == "Gemm" and not transposed)
    initializer = editor.constants.get(node.input[1])
    expected = weight.T if turned else weight
    if initializer is None or not np.array_equal(numpy_helper.to_array(initializer), expected):
        raise UserError(f"{name}: torch.onnx exported another weight than that of this layer")
    return turned


def _quantize_weight(
    name: str,
    holder: str,
    node: NodeProto,
    editor: GraphEditor,
    layer: QuantizedLayer,
    quantizer: InputQuantizer | None,
    turned: bool,
    containers: Containers,
) -> None:
    """Puts the codes of a `layer` and what they stand for before `node`; `holder` names codes that layers share."""
    kind, _ = storage(layer.grid.levels, containers.weights if quantizer is None else containers.with_inputs)
    shift = layer.grid.levels // 2
    codes = layer.codes.cpu().numpy().astype(np.int32) - shift
    zero_point = layer.grid.zero_point.cpu().numpy().astype(np.int32) - shift
    if quantizer is not None and not containers.zero_points:
        # The same values, counted from zero, which are an int8 on grids of 7 bits, and of 8 with zero in the middle.
        steps = codes - zero_point.reshape(-1, *[1] * (codes.ndim - 1))
        if steps.min() >= -128 and steps.max() <= 127:
            codes, zero_point, kind = steps, np.zeros_like(zero_point), TensorProto.INT8
    unchanged = codes
    scale = layer.grid.scale.cpu().numpy().astype(np.float32)
    if quantizer is not None and len(node.input) > 2 and containers.sums:
        bias = numpy_helper.to_array(editor.constants[node.input[2]]).astype(np.float32)
        input_scale = np.float32(quantizer.scale.item())
        codes, scale = _room_for_bias(codes, zero_point, scale, bias, input_scale)
        bias_scale = input_scale * scale
        bias_codes = np.clip(np.rint(bias.astype(np.float64) / bias_scale), -LARGEST, LARGEST).astype(np.int32)
        parts = [
            editor.constant(f"{name}.bias.codes", bias_codes),
            editor.constant(f"{name}.bias.scale", bias_scale),
            editor.constant(f"{name}.bias.zero_point", np.zeros_like(bias_codes)),
        ]
        node.input[2] = editor.add("DequantizeLinear", parts, f"{name}.bias.values", axis=0)
    stored = codes.T if turned else codes
    owner = holder if codes is unchanged and editor.holds(f"{holder}.weight.codes", stored, kind) else name
    source = editor.constant(f"{owner}.weight.codes", stored, kind)
    if quantizer is not None and kind in (TensorProto.INT2, TensorProto.INT4):
        # The integer kernels take 8 bits; a runtime widens the constant once, when it loads the file.
        kind = TensorProto.INT8
        source = editor.add("Cast", [source], f"{name}.weight.wide", to=kind)
    grid = [
        editor.constant(f"{name}.weight.scale", scale),
        editor.constant(f"{name}.weight.zero_point", zero_point, kind),
    ]
    node.input[1] = editor.add("DequantizeLinear", [source, *grid], f"{name}.weight.values", axis=int(turned))


def _room_for_bias(
    codes: np.ndarray, zero_point: np.ndarray, scale: np.ndarray, bias: np.ndarray, input_scale: np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scale), coarser in the channels whose bias has no int32 code at input_scale * scale.

    These are channels that training has all but switched off: their weights add to the bias less than d * 2^-16 of it,
    and rounding them anew moves the output by less than d * 2^-23 of it, d inputs.
    """
    least = np.abs(bias.astype(np.float64)) / (input_scale.astype(np.float64) * (LARGEST - 1024))
    coarse = least > scale
    if not coarse.any():
        return codes, scale
    wider = np.where(coarse, least * (1 + 1e-6), scale).astype(np.float32)
    shape = (-1, *[1] * (codes.ndim - 1))
    offsets = codes - zero_point.reshape(shape)
    rounded = np.rint(offsets * (scale.astype(np.float64) / wider).reshape(shape)).astype(np.int32)
    return np.where(coarse.reshape(shape), rounded + zero_point.reshape(shape), codes), wider
