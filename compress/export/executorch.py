"""Programs of ExecuTorch, `.pte` files for its XNNPACK backend, as apps load them, each with a JSON file beside it.

A `.pte` has no place for what it is: the JSON says that, as other formats say it within, and has the checksum of the
program, so that the runtime, which trusts what it loads, gets nothing that was damaged. The packages are the optional
extra `executorch`.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.errors import UserError, first_line
from compress.export.description import NetworkDescription, check_float32, grids_as_json
from compress.export.exporter import Exporter, import_package, silent_descriptor
from compress.export.onnx_file import check_graph
from compress.export.xnnpack_graph import BATCH, check_int8, exported, quantized_graph
from compress.files import read_json, write_atomically, write_json
from compress.models.folding import fold_batch_norm
from compress.models.tracing import quiet
from compress.quantization import QuantizedModel, Quantizer

FORMAT = "compress-executorch-1"


@dataclass(frozen=True)
class ExecuTorch(Exporter):
    """`export=executorch`: a `.pte` for XNNPACK's kernels of 8 bits, and a `.pte.json` that describes it."""

    suffix, runtime = ".pte", "executorch"
    packages: ClassVar[tuple[str, ...]] = ("executorch",)
    extra = "executorch"
    loading = """\
import torch
from executorch.runtime import Runtime
program = Runtime.get().load_program({file})
batch = torch.from_numpy(images).contiguous()  # 1 to 32 images, read as they lie in memory
[logits] = program.load_method("forward").execute([batch])"""

    def companions(self, path: Path) -> list[Path]:
        return [beside(path)]

    def check(self, quantizer: Quantizer | None) -> None:
        super().check(quantizer)
        if quantizer is None:
            return
        if quantizer.activation_bits is None:
            raise UserError(
                "quantizer.activation_bits: found null for export=executorch, whose kernels take integer weights on "
                "integer inputs; accepted: 2 to 8, or export=packed, onnx, openvino or litert for weights alone"
            )
        check_int8(quantizer, "executorch")

    def write(
        self,
        path: Path,
        network: nn.Module | QuantizedModel,
        description: NetworkDescription,
        calibration_batches: Iterable[Tensor] = (),
    ) -> None:
        """Write a quantized `network` with its integers, a float one with its BatchNorm folded.

        Calibration batches are not needed, as nothing is quantized that was not. The same content gives the same bytes.
        Raises UserError for weights on grids beside float inputs, for a network that is not in float32 or that cannot
        be exported, and where the extra is not installed.
        """
        self.require_packages()
        shape = description.input_shape
        try:
            with quiet(), torch.no_grad():
                if isinstance(network, QuantizedModel):
                    check_float32(path, network)
                    graph = quantized_graph(network, shape)
                    grids = grids_as_json(network)
                else:
                    graph = fold_batch_norm(network, shape).float().cpu().eval()
                    grids = {"layers": [], "inputs": [], "folded": [], "skipped": {}, "tied": {}}
                content = _program(graph, shape)
        except UserError:
            raise
        except Exception as failure:  # of torch.export and of ExecuTorch's passes, which raise whatever they like
            raise UserError(f"{path}: ExecuTorch cannot export this network ({first_line(failure)})") from failure
        about = {"format": FORMAT, "program_sha256": hashlib.sha256(content).hexdigest()}
        # A program without its description, if the process is killed in between, is refused; never the wrong one.
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
        write_json(beside(path), about | description.as_json() | grids)

    def read(self, path: Path, threads: int = 1) -> tuple["ExecuTorchModel", dict[str, Any]]:
        import_package("executorch", self.extra)
        content, description = _read(path)
        try:
            model = ExecuTorchModel(content)
            check_graph(path, description, *model.sizes())
            model(torch.zeros(1, *description["input_shape"]))
        except UserError:
            raise
        except Exception as failure:  # it raises RuntimeError and others
            raise UserError(
                f"{path}: found a program that ExecuTorch cannot run ({first_line(failure)}); accepted: a "
                f"{self.suffix} file that compress wrote"
            ) from None
        return model, description


class ExecuTorchModel:
    """A network as a function: images `(B, C, H, W)`, normalised float32, to logits `(B, classes)` on the CPU.

    More than BATCH images are computed in parts.
    """

    def __init__(self, content: bytes) -> None:
        # A method does not keep the program alive that it reads its weights from.
        self._program = _runtime().load_program(content)
        self._method = self._program.load_method("forward")

    def sizes(self) -> tuple[list[int], list[int]]:
        """Those of the images, `[BATCH, C, H, W]`, and of the logits that the program was exported for."""
        about = self._method.metadata
        return [*about.input_tensor_meta(0).sizes()], [*about.output_tensor_meta(0).sizes()]

    def __call__(self, images: Tensor) -> Tensor:
        parts = images.detach().to("cpu", torch.float32).contiguous().split(BATCH)
        return torch.cat([self._method.execute([part])[0].clone() for part in parts])


@cache
def _runtime() -> Any:
    """ExecuTorch's runtime on one thread, for as long as this process lives.

    All programs share the threads, and one that is loaded would go on with those that another number took the place of.
    """
    with quiet():
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        # It tells the terminal, past Python, what it found in /sys and that it did as it was told.
        with silent_descriptor():
            portable_lib._unsafe_reset_threadpool(1)
        return Runtime.get()


def beside(path: Path) -> Path:
    """The JSON file that describes the program `path`."""
    return path.with_name(f"{path.name}.json")


def _program(graph: nn.Module, shape: Sequence[int]) -> bytes:
    """The content of a `.pte` file."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    lowered = to_edge_transform_and_lower(exported(graph, shape), partitioner=[XnnpackPartitioner()])
    planning = MemoryPlanningPass(alloc_graph_input=False)
    return bytes(lowered.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning)).buffer)


def _read(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Content and description of the program `path`; raises UserError where they are not what compress wrote."""
    accepted = f"accepted: a {ExecuTorch.suffix} file that compress wrote, with its JSON file beside it"
    if not path.is_file():
        raise UserError(f"{path}: found no such file; {accepted}")
    if not beside(path).is_file():
        raise UserError(f"{path}: found no {beside(path).name} beside it; {accepted}")
    description = read_json(beside(path), "the file as compress wrote it")
    if description.get("format") != FORMAT:
        raise UserError(f"{beside(path)}: found no description of a program; {accepted}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != description.pop("program_sha256", None):
        raise UserError(
            f"{path}: found content that does not match its checksum, so it was cut short or altered; {accepted}"
        )
    return content, description
