"""NNCF, as its README has post-training quantization for OpenVINO: the network as OpenVINO's, quantized, saved."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.benchmarks.peers.setting import Network, Setting

INSTALL = "pip install nncf==3.4.0 openvino"
PACKAGES = ("nncf", "openvino")


def settings() -> dict[str, Setting]:
    """`nncf.quantize` by default and at its most accurate, and `nncf.compress_weights` at 8 bits.

    Convolutions have no fewer: INT4_SYM with `all_layers=True` keeps them at 8 bits, too.
    """
    import nncf

    accurate = {"preset": nncf.QuantizationPreset.MIXED, "fast_bias_correction": False}
    symmetric = nncf.CompressWeightsMode.INT8_SYM
    return {
        "`quantize`": _setting(8, 8, _quantized),
        "`quantize`, mixed, `fast_bias_correction=False`": _setting(8, 8, partial(_quantized, **accurate)),
        "`compress_weights`, INT8_SYM": _setting(8, None, partial(_compressed, mode=symmetric)),
    }


def _setting(weights: int, inputs: int | None, quantize: Any) -> Setting:
    return Setting(weights, inputs, quantize, _write, _read, ".xml and .bin", "openvino")


def _converted(network: nn.Module, images: Tensor) -> Any:
    import openvino

    return openvino.convert_model(network, example_input=images[:1], input=[-1, *images.shape[1:]])


def _quantized(network: nn.Module, images: Tensor, **options: Any) -> Any:
    import nncf

    dataset = nncf.Dataset([image.numpy() for image in images.split(1)])
    return nncf.quantize(_converted(network, images), dataset, subset_size=len(images), **options)


def _compressed(network: nn.Module, images: Tensor, **options: Any) -> Any:
    import nncf

    return nncf.compress_weights(_converted(network, images), **options)


def _write(model: Any, folder: Path) -> None:
    import openvino

    openvino.save_model(model, folder / "model.xml")


def _read(folder: Path, network: nn.Module) -> Network:
    """On one thread, with float32 where the file is not on integers, as this project reads its files for OpenVINO."""
    import openvino

    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = openvino.compile_model(folder / "model.xml", "CPU", options)
    return lambda images: torch.from_numpy(compiled(images.numpy(), share_outputs=False)[0])
