"""What is compared: a way to quantize a trained network, the file that it leaves, and a function that runs the file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.export.exporter import import_package

Network = Callable[[Tensor], Tensor]
Quantize = Callable[[nn.Module, Tensor], Any]


@dataclass(frozen=True)
class Setting:
    """One row of the comparison.

    weights: bits of a weight; inputs: bits of the layers' inputs, None where these stay float.
    quantize: of a float network in eval mode and calibration images `(N, 3, H, W)`, normalised; it is what is timed.
    write: puts the files of what `quantize` gave into an empty folder; all of them count.
    read: a function from images `(B, 3, H, W)` to logits that runs the files in the folder; it also gets the float
    network, for its class. file: what the files are; runs: what `read` runs them with.
    """

    weights: float
    inputs: int | None
    quantize: Quantize
    write: Callable[[Any, Path], None]
    read: Callable[[Path, nn.Module], Network]
    file: str
    runs: str


def read_onnx(path: Path, *, optimized: bool = True) -> Network:
    """An ONNX file of anybody in ONNX Runtime on one thread of the CPU; optimized: with its changes to the graph."""
    runtime = import_package("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    [name] = [port.name for port in session.get_inputs()]

    def network(images: Tensor) -> Tensor:
        content: np.ndarray[Any, Any] = images.to(torch.float32).contiguous().numpy()
        return torch.from_numpy(session.run(None, {name: content})[0])

    return network
