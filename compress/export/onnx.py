"""ONNX files `compress-onnx-1`: quantized networks whose integers other runtimes read, and float ones to compare with.

`compress.export.onnx_graph` says what the graph of a quantized network looks like, and `compress.export.onnx_file`
what the file says of itself, so that a reader needs nothing else. The packages `onnx`, `onnxruntime` and `onnxscript`
are the optional extra `onnx`.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.errors import UserError, first_line
from compress.export.container import to_json
from compress.export.description import NetworkDescription, check_float32, grids_as_json
from compress.export.exporter import Exporter
from compress.export.onnx_file import FORMAT, INPUT, OUTPUT, UNSIGNED, Containers
from compress.export.onnx_runtime import OnnxModel, tensor_ranges
from compress.files import write_atomically
from compress.models.folding import fold_batch_norm
from compress.models.tracing import quiet
from compress.quantization import QuantizedModel, Quantizer
from compress.quantization.activations import detach_input_quantizer, input_quantizers

OPSET = 18  # the oldest that torch's exporter writes, and so the one that most runtimes read
LEVELS = 2**16  # the most that an integer type of ONNX weights has


@dataclass(frozen=True)
class Onnx(Exporter):
    """`export=onnx`: QuantizeLinear and DequantizeLinear around integers, run by ONNX Runtime."""

    suffix, runtime = ".onnx", "onnxruntime"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "onnxscript")
    extra = "onnx"
    # One of its passes rounds weights that stayed float, unasked.
    loading = """\
import onnxruntime
session = onnxruntime.InferenceSession({file}, disabled_optimizers=["WeightBiasQuantization"])
[logits] = session.run(None, {{"images": images}})"""
    containers: ClassVar[Containers] = Containers()

    def check(self, quantizer: Quantizer | None) -> None:
        super().check(quantizer)
        if quantizer is None:
            return
        widths = [*quantizer.widths]
        if widths and quantizer.first_last_bits:
            widths.append(quantizer.first_last_bits)
        levels, bits = max([(quantizer.grid.levels(bits), bits) for bits in widths], default=(0, 0))
        if levels > LEVELS:
            raise UserError(
                f"export: found {self.extra} with {levels} levels at {bits} bits; accepted: up to {LEVELS} levels, "
                "which is 16 bits, or export=packed"
            )

    def write(
        self,
        path: Path,
        network: nn.Module | QuantizedModel,
        description: NetworkDescription,
        calibration_batches: Iterable[Tensor] = (),
    ) -> None:
        """Write a quantized `network` with its integers, a float one with its BatchNorm folded.

        The same content gives the same bytes. Where inputs of layers are quantized, the calibration batches give the
        ranges of the residual additions, which then run on integers too; without any, these additions stay float and
        the convolutions before them are slower.

        Raises UserError for weights on more than 65536 levels, for a network that is not in float32 or that torch
        cannot export, and where the extra is not installed.
        """
        self.require_packages()
        if isinstance(network, QuantizedModel):
            graph = _quantized_graph(path, network, description.input_shape, list(calibration_batches), self.containers)
            grids = grids_as_json(network)
        else:
            graph = _float_graph(
                path, fold_batch_norm(network, description.input_shape), description.input_shape, OPSET
            )
            grids = {"layers": [], "inputs": [], "folded": [], "skipped": {}, "tied": {}}
        _write(path, graph, description.as_json() | grids)

    def about(self) -> dict[str, str]:
        return super().about() | {"accuracy_precision": "f32", "latency_precision": "f32"}

    def read(self, path: Path, threads: int = 1) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
        model = OnnxModel.read(path, threads)
        return model, model.description


def _quantized_graph(
    path: Path,
    quantized: QuantizedModel,
    input_shape: Sequence[int],
    batches: Sequence[Tensor],
    containers: Containers,
) -> Any:
    """An onnx.ModelProto with the integers of `quantized`."""
    from compress.export.onnx_graph import quantize_additions, quantize_graph, storage

    check_float32(path, quantized)
    opset = max([OPSET, *(storage(layer.grid.levels, containers.weights)[1] for layer in quantized.layers.values())])
    plain = copy.deepcopy(quantized.model)
    inputs = input_quantizers(plain)
    for name in inputs:
        detach_input_quantizer(plain.get_submodule(name))
    graph = _float_graph(path, plain, input_shape, opset)
    quantize_graph(graph, quantized, containers)
    if batches and inputs and containers.sums:
        quantize_additions(graph, lambda model, tensors: _ranges(model, tensors, batches))
    return graph


def _float_graph(path: Path, model: nn.Module, input_shape: Sequence[int], opset: int) -> Any:
    """The graph of `model` in eval mode, an onnx.ModelProto with the metadata of torch's exporter."""
    from onnx import helper

    model = model.float().cpu().eval()
    with quiet(), torch.no_grad():
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
            reason = first_line(error)
            raise UserError(f"{path}: torch.onnx cannot export {type(model).__name__} ({reason})") from error
        assert program is not None  # as with `dynamo` it always is
        graph = program.model_proto
    graph.ir_version = helper.find_min_ir_version_for(graph.opset_import)
    return graph


def _ranges(model: Any, tensors: Sequence[str], batches: Sequence[Tensor]) -> dict[str, tuple[float, float]]:
    """Lowest and highest value of each of `tensors` over `batches`, as ONNX Runtime computes `model` in float."""
    from onnx import TensorProto, helper

    watched = copy.deepcopy(model)
    outputs = []
    for tensor in tensors:
        pair = f"{tensor}_ReduceMin", f"{tensor}_ReduceMax"
        for operator, name in zip(("ReduceMin", "ReduceMax"), pair, strict=True):
            watched.graph.node.append(helper.make_node(operator, [tensor], [name], keepdims=0))
            watched.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
        outputs.append(pair)
    ranges = tensor_ranges(watched.SerializeToString(), outputs, batches)
    return {tensor: ranges[lowest] for tensor, (lowest, _) in zip(tensors, outputs, strict=True)}


def _write(path: Path, graph: Any, description: Mapping[str, Any]) -> None:
    """Strip what differs between machines, add the metadata and the checksum, and write the file."""
    from onnx import helper

    for part in (graph.graph, *graph.graph.node, *graph.graph.initializer, *graph.graph.input, *graph.graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.graph.value_info[:]
    metadata = {"description": to_json(description), "format": FORMAT, "sha256": UNSIGNED.decode()}
    helper.set_model_props(graph, metadata)
    digest = hashlib.sha256(graph.SerializeToString(deterministic=True)).hexdigest()
    helper.set_model_props(graph, metadata | {"sha256": digest})
    write_atomically(path, lambda temporary: temporary.write_bytes(graph.SerializeToString(deterministic=True)))
