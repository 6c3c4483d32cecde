"""ONNX files run by ONNX Runtime on the CPU: logits, latencies, and the ranges of tensors inside a graph.

The package `onnxruntime` is the optional extra `onnx`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.cpu import sums_hold
from compress.errors import UserError
from compress.export.exporter import import_package
from compress.export.onnx_file import INPUT, OUTPUT, check_graph, read_onnx


class OnnxModel:
    """An ONNX file as a function: images `(B, 3, H, W)`, normalised float32, to logits `(B, classes)` on the CPU.

    `description` is what the file says of its network, as `compress.export.packed.read_model` gives it.
    """

    def __init__(self, session: Any, description: dict[str, Any]) -> None:
        self._session = session
        self.description = description

    @classmethod
    def read(cls, path: Path, threads: int = 1) -> "OnnxModel":
        """Raises UserError, naming the file, where it is missing, damaged or not written by compress."""
        import_package("onnxruntime", "onnx")
        content, description = read_onnx(path, ".onnx")
        try:
            session = start(content, threads)
        except Exception:  # ONNX Runtime has a class for each of its errors, without a common one
            raise UserError(
                f"{path}: found a network that ONNX Runtime cannot load; accepted: an .onnx file that compress wrote"
            ) from None
        check_graph(path, description, session.get_inputs()[0].shape, session.get_outputs()[0].shape)
        if not description.get("inputs"):
            # Without integer kernels to gain, the weights are dequantized once instead of in every call.
            session = start(content, threads, dequantize_once=True)
        return cls(session, description)

    def __call__(self, images: Tensor) -> Tensor:
        content = images.detach().to("cpu", torch.float32).contiguous().numpy()
        return torch.from_numpy(self._session.run([OUTPUT], {INPUT: content})[0])


def start(content: bytes, threads: int = 1, *, optimized: bool = True, dequantize_once: bool = False) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU."""
    runtime = import_package("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    # Otherwise the inputs of a MatMul whose weights alone are integers are rounded to 8 bits, unasked.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not sums_hold():
        # These kernels are slower (measured: 3.8 against 2.2 ms for a ResNet-18), and only x86 knows them.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if dequantize_once:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not optimized:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # That pass rounds weights that stayed float; what is to be integer is so in the file.
    disabled = ["WeightBiasQuantization"]
    providers = ["CPUExecutionProvider"]
    try:
        return runtime.InferenceSession(content, options, providers, disabled_optimizers=disabled)
    except Exception:  # ONNX Runtime has a class for each of its errors, without a common one
        if sums_hold():
            raise
        copied = _with_weights_of_their_own(content)
        return runtime.InferenceSession(copied, options, providers, disabled_optimizers=disabled)


def _with_weights_of_their_own(content: bytes) -> bytes:
    """The same model with a copy of its codes for every further layer that has the same weight.

    With `x64quantprecision` ONNX Runtime 1.24 rewrites the codes of each layer, and fails where two layers share them.
    """
    onnx = import_package("onnx", "onnx")
    model = onnx.load_from_string(content)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    sources = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    seen: set[str] = set()
    nodes: list[Any] = []
    for node in model.graph.node:
        weight = sources.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type in ("Conv", "Gemm", "MatMul") and weight is not None and weight.input[0] in constants:
            if weight.input[0] in seen:
                copy = onnx.NodeProto()
                copy.CopyFrom(weight)
                for index, name in enumerate(weight.input):
                    copy.input[index] = f"{name}.copy{len(nodes)}"
                    tensor = model.graph.initializer.add()
                    tensor.CopyFrom(constants[name])
                    tensor.name = copy.input[index]
                copy.output[0] = node.input[1] = f"{weight.output[0]}.copy{len(nodes)}"
                copy.name = f"node_{copy.output[0]}"
                nodes.append(copy)
            seen.add(weight.input[0])
        nodes.append(node)
    if len(nodes) == len(model.graph.node):
        return content
    read = {name for node in nodes for name in node.input} | {output.name for output in model.graph.output}
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes if read & set(node.output)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    changed: bytes = model.SerializeToString()
    return changed


def tensor_ranges(
    content: bytes, outputs: Sequence[tuple[str, str]], batches: Iterable[Tensor]
) -> dict[str, tuple[float, float]]:
    """Lowest and highest value over all `batches` of the scalars named by (lowest, highest) output pairs."""
    session = start(content, optimized=False)
    names = [name for pair in outputs for name in pair]
    extremes = np.stack(
        [np.stack(session.run(names, {INPUT: batch.cpu().float().contiguous().numpy()})).ravel() for batch in batches]
    )
    low, high = extremes.min(0)[0::2], extremes.max(0)[1::2]
    return {lowest: (float(a), float(b)) for (lowest, _), a, b in zip(outputs, low, high, strict=True)}
