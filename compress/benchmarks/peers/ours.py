"""This project, by `compress.quantize` with its defaults: the same codes in files of several runtimes, and rates."""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress.benchmarks.peers.setting import Network, Quantize, Setting
from compress.export.formats import exporter_called, read_back
from compress.pipeline.own_module import QuantizedNetwork, quantize

INSTALL = ""
PACKAGES = ("torch", "onnxruntime", "openvino", "executorch")
FILES = {
    "packed": ".safetensors, entropy-coded",
    "onnx": ".onnx, QDQ",
    "openvino": ".onnx, QDQ for OpenVINO",
    "executorch": ".pte for XNNPACK, and its JSON",
}


def quantized(network: nn.Module, images: Tensor, bits: int | None = None, **keys: Any) -> QuantizedNetwork:
    """On all of `images`."""
    return quantize(network, images, bits, calibration_images=len(images), **keys)


def settings() -> dict[str, Setting]:
    """Weights and inputs of 8 bits in each runtime, then fixed widths and rates of the weights alone.

    Raises UserError where the package of a runtime is missing.
    """
    on_integers = partial(quantized, bits=8, activation_bits=8)
    in_runtimes = {f"gpfq, `export={format}`": _setting(on_integers, 8, 8, format) for format in FILES}
    widths = {f"gpfq, `bits={bits}`": _setting(partial(quantized, bits=bits), bits) for bits in (8, 4, 2)}
    rates = {f"gpfq, `rates={rate}`": _setting(partial(quantized, rates=rate), rate) for rate in (2, 1.4)}
    return in_runtimes | widths | rates


def _setting(quantize: Quantize, weights: float, inputs: int | None = None, format: str = "packed") -> Setting:
    exporter = exporter_called(format)
    exporter.require_packages()

    def write(result: QuantizedNetwork, folder: Path) -> None:
        result.export(folder / f"model{exporter.suffix}", format=format)

    def read(folder: Path, network: nn.Module) -> Network:
        model, _ = read_back(exporter, folder / f"model{exporter.suffix}", own_network=network)
        result: Network = model
        return result

    return Setting(weights, inputs, quantize, write, read, FILES[format], exporter.runtime)
