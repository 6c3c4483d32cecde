"""AIMET for PyTorch, as its guides have post-training quantization: BatchNorm folded, then a `QuantizationSimModel`.

Weights of 8 bits have the ranges of its default scheme; narrower ones are found by sequential MSE or by AdaRound. The
first and the last layer have 8 bits, as here.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.benchmarks.peers.setting import Network, Setting, read_onnx

INSTALL = "pip install aimet-torch==2.42.0 onnxruntime"
PACKAGES = ("aimet-torch",)
BATCH = 32
OPSET = 21  # the first with integers of 4 bits


def settings() -> dict[str, Setting]:
    """8 bits with inputs of 8, and 4 bits of the weights alone."""
    import aimet_torch  # noqa: F401

    ways: dict[str, tuple[int, int | None, Callable[..., Any]]] = {
        "QuantSim, 8 bit": (8, 8, _ranges),
        "sequential MSE, 4 bit": (4, None, _sequential_mse),
        "AdaRound, 4 bit": (4, None, _adaround),
    }
    return {
        name: Setting(bits, inputs, partial(_quantized, *way), _write, _read, ".onnx, QDQ", "onnxruntime")
        for name, way in ways.items()
        for bits, inputs, _ in [way]
    }


def _quantized(
    bits: int, inputs: int | None, find: Callable[..., Any], network: nn.Module, images: Tensor
) -> tuple[Any, Tensor]:
    """The simulation, and an image to export it with."""
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.model_preparer import prepare_model

    model = prepare_model(network)
    fold_all_batch_norms(model, tuple(images[:1].shape), dummy_input=images[:1])
    return find(model, bits, inputs, images), images[:1]


def _simulation(model: Any, bits: int, inputs: int | None, images: Tensor) -> Any:
    from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
    from aimet_torch.quantsim import QuantizationSimModel

    config = get_path_for_per_channel_config()
    simulation = QuantizationSimModel(model, images[:1], default_param_bw=bits, config_file=config)
    layers = [layer for layer in simulation.qmodules() if "weight" in layer.param_quantizers]
    for layer in (layers[0], layers[-1]):
        layer.param_quantizers["weight"].bitwidth = 8
    if inputs is None:
        for layer in simulation.qmodules():
            layer.input_quantizers[:] = [None] * len(layer.input_quantizers)
            layer.output_quantizers[:] = [None] * len(layer.output_quantizers)
    return simulation


def _ranges(model: Any, bits: int, inputs: int | None, images: Tensor) -> Any:
    simulation = _simulation(model, bits, inputs, images)
    _compute(simulation, images)
    return simulation


def _sequential_mse(model: Any, bits: int, inputs: int | None, images: Tensor) -> Any:
    from aimet_torch.seq_mse import apply_seq_mse

    simulation = _simulation(model, bits, inputs, images)
    apply_seq_mse(simulation, list(images.split(BATCH)))
    _compute(simulation, images)
    return simulation


def _adaround(model: Any, bits: int, inputs: int | None, images: Tensor) -> Any:
    """With the iterations of its defaults, which its documentation strongly recommends not to lower."""
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config

    batches = list(images.split(BATCH))
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    with tempfile.TemporaryDirectory() as folder:
        rounded = Adaround.apply_adaround(
            model,
            images[:1],
            AdaroundParameters(batches, len(batches)),
            folder,
            "rounded",
            default_param_bw=bits,
            param_bw_override_list=[(layers[0], 8), (layers[-1], 8)],
            default_config_file=get_path_for_per_channel_config(),
        )
        simulation = _simulation(rounded, bits, inputs, images)
        simulation.set_and_freeze_param_encodings(str(Path(folder) / "rounded.encodings"))
    _compute(simulation, images)
    return simulation


def _compute(simulation: Any, images: Tensor) -> None:
    def run(model: Any) -> None:
        with torch.no_grad():
            for part in images.split(BATCH):
                model(part)

    simulation.compute_encodings(run)


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
