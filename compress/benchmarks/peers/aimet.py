"""AIMET for PyTorch, as its guides have post-training quantization: BatchNorm folded, then a `QuantizationSimModel`.

Weights and inputs of 8 bits have the ranges of its default scheme.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.benchmarks.peers.setting import Network, Setting, read_onnx

INSTALL = "pip install aimet-torch==2.42.0 onnxruntime"
PACKAGES = ("aimet-torch",)
BATCH = 32
OPSET = 21


def settings() -> dict[str, Setting]:
    """8 bits with inputs of 8."""
    import aimet_torch  # noqa: F401

    return {"QuantSim, 8 bit": Setting(8, 8, _quantized, _write, _read, ".onnx, QDQ", "onnxruntime")}


def _quantized(network: nn.Module, images: Tensor) -> tuple[Any, Tensor]:
    """The simulation, and an image to export it with."""
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel

    def run(model: Any) -> None:
        with torch.no_grad():
            for part in images.split(BATCH):
                model(part)

    model = prepare_model(network)
    fold_all_batch_norms(model, tuple(images[:1].shape), dummy_input=images[:1])
    simulation = QuantizationSimModel(model, images[:1], config_file=get_path_for_per_channel_config())
    simulation.compute_encodings(run)
    return simulation, images[:1]


def _write(result: tuple[Any, Tensor], folder: Path) -> None:
    import aimet_torch

    simulation, image = result
    aimet_torch.onnx.export(
        simulation.model,
        image,
        str(folder / "model.onnx"),
        prequantize_constants=True,
        opset_version=OPSET,
        dynamo=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
    )


def _read(folder: Path, network: nn.Module) -> Network:
    """As its documentation runs it; ONNX Runtime 1.32 computes something else with its optimizations."""
    return read_onnx(folder / "model.onnx", optimized=False)
