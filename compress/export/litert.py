"""Files of LiteRT, once TensorFlow Lite: `.tflite`, as apps load them, with the integers of a quantized network.

`compress.export.litert_graph` says which operators a network becomes, and `compress.export.litert_file` what the file
says of itself, so that a reader needs nothing else. The package `ai-edge-litert` is the optional extra `litert`; no
converter is needed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.errors import UserError, first_line
from compress.export.description import NetworkDescription, check_float32, grids_as_json
from compress.export.exporter import Exporter, import_package, silent_descriptor
from compress.export.litert_file import GraphFile, read_litert
from compress.export.onnx_file import check_graph
from compress.files import write_atomically
from compress.models.folding import fold_batch_norm
from compress.models.tracing import quiet
from compress.quantization import QuantizedModel, Quantizer


@dataclass(frozen=True)
class LiteRt(Exporter):
    """`export=litert`: a `.tflite` with operators of 8 bits, and weights of 8 and 4 bits beside float inputs."""

    suffix, runtime = ".tflite", "litert"
    packages: ClassVar[tuple[str, ...]] = ("ai_edge_litert",)
    extra = "litert"
    loading = """\
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter({file})
interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], images.shape)
logits = interpreter.get_signature_runner()(images=images)["logits"]"""

    def check(self, quantizer: Quantizer | None) -> None:
        super().check(quantizer)
        if quantizer is not None:
            from compress.export.xnnpack_graph import check_int8

            check_int8(quantizer, "litert")

    def write(
        self,
        path: Path,
        network: nn.Module | QuantizedModel,
        description: NetworkDescription,
        calibration_batches: Iterable[Tensor] = (),
    ) -> None:
        """Write a quantized `network` with its integers, a float one with its BatchNorm folded.

        Calibration batches are not needed, as nothing is quantized that was not. The same content gives the same bytes.
        Raises UserError for a network that is not in float32, that torch cannot export or that has an operator which is
        not written for LiteRT, and where the extra is not installed.
        """
        self.require_packages()
        from compress.export.litert_graph import write_graph
        from compress.export.xnnpack_graph import functional, quantized_graph

        shape = description.input_shape
        file = GraphFile()
        try:
            with quiet(), torch.no_grad():
                if isinstance(network, QuantizedModel):
                    check_float32(path, network)
                    graph: nn.Module = quantized_graph(network, shape, float_inputs=True)
                    grids = grids_as_json(network)
                else:
                    graph = fold_batch_norm(network, shape).float().cpu().eval()
                    grids = {"layers": [], "inputs": [], "folded": [], "skipped": {}, "tied": {}}
                ends = write_graph(functional(graph, shape), file)
        except UserError as mistake:
            raise mistake if str(mistake).startswith(str(path)) else UserError(f"{path}: {mistake}") from mistake
        except Exception as failure:  # of torch.export, which raises whatever it likes
            raise UserError(f"{path}: torch.export cannot export this network ({first_line(failure)})") from failure
        content = file.packed(*ends, description.as_json() | grids)
        write_atomically(path, lambda temporary: temporary.write_bytes(content))

    def read(self, path: Path, threads: int = 1) -> tuple["LiteRtModel", dict[str, Any]]:
        import_package("ai_edge_litert", self.extra)
        content, description = read_litert(path, self.suffix)
        try:
            model = LiteRtModel(content, threads)
            images, logits = model.sizes()
            check_graph(path, description, images, logits)
            model(torch.zeros(1, *description["input_shape"]))
        except UserError:
            raise
        except Exception as failure:  # it raises ValueError, RuntimeError and others
            raise UserError(
                f"{path}: found a network that LiteRT cannot run ({first_line(failure)}); accepted: a "
                f"{self.suffix} file that compress wrote"
            ) from None
        return model, description

    def about(self) -> dict[str, str]:
        return {"version": version("ai-edge-litert")}


class LiteRtModel:
    """A network as a function: images `(B, C, H, W)`, normalised float32, to logits `(B, classes)` on the CPU.

    Its memory is planned for the batch size of its last call.
    """

    def __init__(self, content: bytes, threads: int) -> None:
        from ai_edge_litert.interpreter import Interpreter

        # It tells the terminal, past Python, that it uses XNNPACK.
        with silent_descriptor():
            self._interpreter = Interpreter(model_content=content, num_threads=threads)
            self._interpreter.allocate_tensors()
        [images], [logits] = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        self._images, self._logits, self._batch = images["index"], logits["index"], 1

    def sizes(self) -> tuple[list[int], list[int]]:
        """Those of the images, `[1, C, H, W]`, and of the logits that the file has."""
        ends = self._interpreter.get_input_details()[0], self._interpreter.get_output_details()[0]
        images, logits = ([int(size) for size in end["shape"]] for end in ends)
        return images, logits

    def __call__(self, images: Tensor) -> Tensor:
        content = images.detach().to("cpu", torch.float32).contiguous().numpy()
        if len(content) != self._batch:
            self._interpreter.resize_tensor_input(self._images, content.shape)
            with silent_descriptor():
                self._interpreter.allocate_tensors()
            self._batch = len(content)
        self._interpreter.set_tensor(self._images, content)
        self._interpreter.invoke()
        return torch.from_numpy(self._interpreter.get_tensor(self._logits))
