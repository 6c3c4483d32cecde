"""ONNX files `compress-onnx-1`: quantized networks whose integers other runtimes read, and float ones to compare with.

What the graph of a quantized network looks like says `compress.export.onnx_graph`. The metadata of the model holds the
name of the format, the description that packed files have too, as JSON, and a checksum over the file, so a reader
needs nothing else. The packages `onnx`, `onnxruntime` and `onnxscript` are the optional extra `onnx`.
"""

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.export.onnx_runtime import (
    FORMAT,
    INPUT,
    OUTPUT,
    UNSIGNED,
    OnnxModel,
    checksum,
    required,
    tensor_ranges,
)
from compress.export.packed import grids_description, network_description
from compress.files import write_atomically
from compress.models.folding import fold_batch_norm
from compress.quantization.activations import detach_input_quantizer, input_quantizers
from compress.quantization.post_training import QuantizedModel

__all__ = ["OnnxModel", "write_onnx", "write_onnx_float"]

OPSET = 18  # the oldest that torch's exporter writes, and so the one that most runtimes read


def write_onnx(
    path: str | Path,
    quantized: QuantizedModel,
    *,
    architecture: Mapping[str, Any],
    class_names: Sequence[str],
    mean: Sequence[float],
    standard_deviation: Sequence[float],
    input_shape: Sequence[int],
    calibration_batches: Iterable[Tensor] = (),
    extra: Mapping[str, Any] | None = None,
) -> int:
    """Write `quantized` with its integers; returns the size in bytes. The same content gives the same bytes.

    The arguments are those of `compress.export.write_packed`. calibration_batches: normalised images `(B, 3, H, W)`.
    Where inputs of layers are quantized, they give the ranges of the residual additions, which then run on integers
    too; without any, these additions stay float and the convolutions before them are slower.

    Raises UserError for weights on more than 256 levels, for a network that is not in float32 or that torch cannot
    export, and where the extra `onnx` is not installed.
    """
    require_all()
    from compress.export.onnx_graph import quantize_additions, quantize_graph, storage

    path = Path(path)
    opset = OPSET
    for name, layer in quantized.layers.items():
        if layer.grid.scale.dtype != torch.float32:
            raise UserError(f"{path}: found {layer.grid.scale.dtype} weights in {name}; accepted: torch.float32")
        opset = max(opset, storage(layer.grid.levels)[1])
    plain = copy.deepcopy(quantized.model)
    for name in input_quantizers(plain):
        detach_input_quantizer(plain.get_submodule(name))
    graph = _exported(path, plain, input_shape, opset)
    quantize_graph(graph, quantized)
    batches = list(calibration_batches)
    if batches and input_quantizers(quantized.model):
        quantize_additions(graph, lambda model, tensors: _ranges(model, tensors, batches))
    description = network_description(architecture, class_names, mean, standard_deviation, input_shape, extra)
    return _write(path, graph, description | grids_description(quantized))


def write_onnx_float(
    path: str | Path,
    model: nn.Module,
    *,
    architecture: Mapping[str, Any],
    class_names: Sequence[str],
    mean: Sequence[float],
    standard_deviation: Sequence[float],
    input_shape: Sequence[int],
    extra: Mapping[str, Any] | None = None,
) -> int:
    """Write `model` in float32, its BatchNorm folded; returns the size in bytes. See `write_onnx`."""
    require_all()
    graph = _exported(Path(path), fold_batch_norm(model), input_shape, OPSET)
    description = network_description(architecture, class_names, mean, standard_deviation, input_shape, extra)
    return _write(Path(path), graph, description | {"layers": [], "inputs": [], "folded": [], "skipped": {}})


def require_all() -> None:
    """Raises UserError, naming the extra, where a package of it is not installed."""
    for module in ("onnx", "onnxruntime", "onnxscript"):
        required(module)


def _exported(path: Path, model: nn.Module, input_shape: Sequence[int], opset: int) -> Any:
    """The graph of `model` in eval mode, an onnx.ModelProto with the metadata of torch's exporter."""
    from onnx import helper

    model = model.float().cpu().eval()
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                model,
                (torch.zeros(2, *input_shape),),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
        except torch.onnx.OnnxExporterError as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UserError(f"{path}: torch.onnx cannot export {type(model).__name__} ({reason})") from error
        graph = program.model_proto
    graph.ir_version = helper.find_min_ir_version_for(graph.opset_import)
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and no log of an exporter that has much to say about its own passes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _ranges(model: Any, tensors: Sequence[str], batches: Sequence[Tensor]) -> dict[str, tuple[float, float]]:
    """Lowest and highest value of each of `tensors` over `batches`, as ONNX Runtime computes `model` in float."""
    from onnx import TensorProto, helper

    watched = copy.deepcopy(model)
    outputs = []
    for tensor in tensors:
        pair = tuple(f"{tensor}_{operator}" for operator in ("ReduceMin", "ReduceMax"))
        for operator, name in zip(("ReduceMin", "ReduceMax"), pair, strict=True):
            watched.graph.node.append(helper.make_node(operator, [tensor], [name], keepdims=0))
            watched.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
        outputs.append(pair)
    found = tensor_ranges(watched.SerializeToString(), outputs, batches)
    return {tensor: found[lowest] for tensor, (lowest, _) in zip(tensors, outputs, strict=True)}


def _write(path: Path, graph: Any, description: Mapping[str, Any]) -> int:
    """Strip what differs between machines, add the metadata and the checksum, and write the file."""
    from onnx import helper

    for part in (graph.graph, *graph.graph.node, *graph.graph.initializer, *graph.graph.input, *graph.graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.graph.value_info[:]
    text = json.dumps(description, separators=(",", ":"), sort_keys=True, allow_nan=False)
    metadata = {"description": text, "format": FORMAT, "sha256": UNSIGNED.decode()}
    helper.set_model_props(graph, metadata)
    digest = checksum(graph.SerializeToString(deterministic=True))
    helper.set_model_props(graph, metadata | {"sha256": digest})
    write_atomically(path, lambda temporary: temporary.write_bytes(graph.SerializeToString(deterministic=True)))
    return path.stat().st_size
