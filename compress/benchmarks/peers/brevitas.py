"""Brevitas, by the functions of its own example `imagenet_classification/ptq`, which its package has.

As in that example: BatchNorm is merged and the graph equalized in 20 iterations, weights have a scale per channel that
minimises their squared error, and biases are corrected in the end. The first and the last layer have 8 bits, as here.
"""

from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from compress.benchmarks.peers.setting import Network, Setting, read_onnx

INSTALL = "pip install brevitas==0.13.4 accelerate onnxoptimizer onnxruntime"
PACKAGES = ("brevitas",)

Loader = list[tuple[Tensor, Tensor]]
# The example's defaults for one of the ways to round that it offers, that of AdaRound.
LEARNED_ROUND = Namespace(
    learned_round="hard_sigmoid",
    learned_round_mode="layerwise",
    learned_round_loss="regularised_mse",
    learned_round_iters=1000,
    learned_round_lr=1e-3,
    learned_round_lr_scheduler=None,
    learned_round_batch_size=1,
)


def settings() -> dict[str, Setting]:
    """GPTQ, GPFQ and learned rounding at 8 bits with inputs of 8, and at 4 and 2 bits of the weights alone."""
    import onnxoptimizer  # noqa: F401  # its export imports it, after all the work
    from brevitas_examples.imagenet_classification.ptq import learned_round_utils, ptq_common  # noqa: F401

    solvers = {"GPTQ": _gptq, "GPFQ": _gpfq, "learned round": _learned_round}
    return {
        f"{name}, {bits} bit": Setting(
            bits, inputs, partial(_quantized, solve, bits, inputs), _write, _read, ".onnx, QCDQ", "onnxruntime"
        )
        for name, solve in solvers.items()
        for bits, inputs in ((8, 8), (4, None), (2, None))
    }


def _gptq(model: nn.Module, loader: Loader) -> None:
    """It keeps the float weights, against which biases are corrected, as the example does unless told otherwise."""
    from brevitas_examples.imagenet_classification.ptq.ptq_common import apply_gptq

    apply_gptq(loader, model, create_weight_orig=True)


def _gpfq(model: nn.Module, loader: Loader) -> None:
    from brevitas_examples.imagenet_classification.ptq.ptq_common import apply_gpfq

    apply_gpfq(loader, model, act_order=False)


def _learned_round(model: nn.Module, loader: Loader) -> None:
    """In float32: the example's float16 takes a CPU many times as long."""
    from brevitas_examples.imagenet_classification.ptq import learned_round_utils

    with patch.object(learned_round_utils.LearnedRoundTrainer, "_amp_context_manager", lambda _: nullcontext()):
        learned_round_utils.apply_learned_round(model, loader, LEARNED_ROUND)


def _quantized(
    solve: Callable[[nn.Module, Loader], None], bits: int, inputs: int | None, network: nn.Module, images: Tensor
) -> tuple[Any, Tensor]:
    """The quantized network, and an image to export it with."""
    from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize
    from brevitas_examples.imagenet_classification.ptq import ptq_common

    loader = [(part, part) for part in images.split(64)]
    model = preprocess_for_quantize(network, equalize_iters=20)
    model = layerwise_quantize(model, _layers(bits, inputs))
    with torch.no_grad():
        model(images[:64])  # which makes the scales, as the example does
    if inputs is not None:
        ptq_common.calibrate(loader, model)
    solve(model, loader)
    ptq_common.apply_bias_correction(loader, model)
    return model.eval(), images[:1]


def _layers(bits: int, inputs: int | None) -> Any:
    """Which class of Brevitas a layer becomes, and how."""
    from brevitas.inject import value
    from brevitas_examples.imagenet_classification.ptq import ptq_common

    def width(module: nn.Module) -> int:
        return 8 if isinstance(module, nn.Linear) or getattr(module, "in_channels", 0) == 3 else bits

    _, layers, *_ = ptq_common.create_quant_maps(
        dtype=torch.float32,
        bias_bit_width=32,
        weight_bit_width=value(width),
        weight_param_method="mse",
        weight_scale_type="float_scale",
        weight_quant_type="sym",
        weight_quant_granularity="per_channel",
        weight_narrow_range=False,
        weight_quant_format="int",
        act_quant_format="int",
        act_bit_width=inputs,
        act_scale_type="float_scale",
        act_scale_computation_type="static",
        act_param_method="stats",
        act_quant_type="sym",
        act_quant_granularity="per_tensor",
        act_quant_percentile=99.999,
    )
    return layers


def _write(result: tuple[Any, Tensor], folder: Path) -> None:
    from brevitas.export import export_onnx_qcdq

    model, image = result
    export_onnx_qcdq(
        model,
        args=image,
        export_path=str(folder / "model.onnx"),
        dynamo=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
    )


def _read(folder: Path, network: nn.Module) -> Network:
    return read_onnx(folder / "model.onnx")
