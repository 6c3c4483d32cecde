"""ONNX files for OpenVINO: our integers in the types that it computes with, and nothing that it quantizes anew.

It has no 2-bit integers, so codes of 1 and 2 bits lie in 4-bit ones; its integer kernels take int8 weights without zero
points, so the weights of a layer with quantized inputs are int8 steps from zero. Biases and residual additions stay
float, as its integer kernels have them anyway, which is closer to what was trained than `export=onnx` is. Such a file
is one that `compress.export.onnx_file` describes, and any runtime of ONNX reads it. The package `openvino` is in the
optional extra of that name.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.cpu import sums_hold
from compress.errors import UserError, first_line
from compress.export.exporter import import_package
from compress.export.onnx import Onnx
from compress.export.onnx_file import INPUT, Containers, check_graph, read_onnx

DEVICE, PRECISION = "CPU", "INFERENCE_PRECISION_HINT"


@dataclass(frozen=True)
class OpenVino(Onnx):
    """`export=openvino`: an ONNX file that OpenVINO runs, in float32 for accuracies.

    Latencies are those of OpenVINO's default: what is not on integers is computed in bfloat16 where the CPU can.
    """

    suffix, runtime = ".openvino.onnx", "openvino"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "openvino")
    extra = "openvino"
    # As accuracies are measured, see `_read`.
    loading = """\
import openvino
exact = {{"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}}
logits = openvino.compile_model({file}, "CPU", exact)(images)[0]"""
    containers: ClassVar[Containers] = Containers(weights=4, with_inputs=8, zero_points=False, sums=False)

    def read(self, path: Path, threads: int = 1) -> tuple["OpenVinoModel", dict[str, Any]]:
        return _read(path, threads, {PRECISION: "f32"})

    def read_for_latency(self, path: Path) -> "OpenVinoModel":
        return _read(path, 1, {})[0]

    def about(self) -> dict[str, str]:
        default = _core(import_package("openvino", self.extra)).get_property(DEVICE, PRECISION)
        return super().about() | {"latency_precision": default.to_string()}


class OpenVinoModel:
    """A network as a function: images `(B, C, H, W)`, normalised float32, to logits `(B, classes)` on the CPU.

    It is compiled for the batch size of its last call, as OpenVINO is faster for a size that it knows.
    """

    def __init__(self, core: Any, network: Any, options: dict[str, Any]) -> None:
        self._core, self._network, self._options = core, network, options
        self._compile(1)

    def _compile(self, batch: int) -> None:
        _, *image = self._network.input(0).partial_shape
        self._network.reshape({INPUT: [batch, *image]})
        self._batch, self._compiled = batch, self._core.compile_model(self._network, DEVICE, self._options)

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) != self._batch:
            self._compile(len(images))
        content = images.detach().to("cpu", torch.float32).contiguous().numpy()
        return torch.from_numpy(self._compiled(content, share_outputs=False)[0])


@cache
def _core(openvino: ModuleType) -> Any:
    """The one `Core` of this process.

    On CPUs with AMX a Core gives its thread another stack for signals, and takes that away when it is deleted, even
    where a later Core remembers it as the one to go back to: the process would die of the next signal, as of Ctrl-C.
    """
    return openvino.Core()


def _read(path: Path, threads: int, options: dict[str, Any]) -> tuple[OpenVinoModel, dict[str, Any]]:
    """(model, description) of a file, compiled with `options` and what never changes. Raises UserError as `read`."""
    openvino = import_package("openvino", OpenVino.extra)
    content, description = read_onnx(path, OpenVino.suffix)
    options = {
        "INFERENCE_NUM_THREADS": threads,
        # Several processes would otherwise wait for the same core.
        "ENABLE_CPU_PINNING": False,
        # Otherwise the inputs of a linear layer whose weights alone are integers are rounded to 8 bits, unasked.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        **options,
    }
    if not sums_hold():
        # Its integer kernels saturate there (measured for a convolution: 18 % off); without them it computes in float.
        options["LP_TRANSFORMS_MODE"] = "NO"
    core = _core(openvino)
    try:
        network = core.read_model(content, b"")
        images, logits = ([*port.partial_shape] for port in (network.input(0), network.output(0)))
        model = OpenVinoModel(core, network, options)
    except Exception as failure:  # it raises RuntimeError and, for a value that it does not know, others
        raise UserError(
            f"{path}: found a network that OpenVINO cannot load ({_reason(failure)}); accepted: an "
            f"{OpenVino.suffix} file that compress wrote"
        ) from None
    check_graph(path, description, [*map(_size, images)], [*map(_size, logits)])
    return model, description


def _reason(failure: Exception) -> str:
    """The first line that is not about OpenVINO's own source."""
    lines = [line.strip() for line in str(failure).splitlines()]
    own = ("Exception from ", "Check '")
    return next((line for line in lines if line and not line.startswith(own)), first_line(failure))


def _size(dimension: Any) -> int | None:
    return int(dimension.get_length()) if dimension.is_static else None
