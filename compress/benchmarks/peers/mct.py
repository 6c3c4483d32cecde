"""Sony's MCT, as its README has post-training quantization: `pytorch_post_training_quantization` with its defaults.

Scales of inputs are powers of two, as its default platform, the IMX500, has them.
"""

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from compress.benchmarks.peers.setting import Network, Setting, read_onnx

INSTALL = "pip install model-compression-toolkit==2.6.1 onnxruntime"
PACKAGES = ("model-compression-toolkit",)
BATCH = 32


def settings() -> dict[str, Setting]:
    """8 and 4 bits with inputs of 8, which its platforms always quantize; the first and the last layer have 8 bits."""
    import model_compression_toolkit  # noqa: F401

    return {
        f"PTQ, {bits} bit": Setting(
            bits, 8, partial(_quantized, bits), _write, _read, ".onnx, QDQ for inputs, weights float", "onnxruntime"
        )
        for bits in (8, 4)
    }


def _quantized(bits: int, network: nn.Module, images: Tensor) -> tuple[Any, Tensor]:
    """The quantized network, and an image to export it with."""
    import model_compression_toolkit as mct

    def representative() -> Any:
        for part in images.split(BATCH):
            yield [part.numpy()]

    model, _ = mct.ptq.pytorch_post_training_quantization(
        network, representative, core_config=mct.core.CoreConfig(bit_width_config=_widths(bits))
    )
    return model, images[:1]


def _widths(bits: int) -> Any:
    """Of the convolutions behind the first; all else has 8 bits."""
    import model_compression_toolkit as mct
    from model_compression_toolkit.core.common.graph.graph_matchers import NodeFrameworkAttrMatcher
    from model_compression_toolkit.core.common.network_editors import NodeTypeFilter

    widths = mct.core.BitWidthConfig()
    if bits < 8:
        first = NodeFrameworkAttrMatcher("in_channels", 3)
        widths.set_manual_weights_bit_width([NodeTypeFilter(nn.Conv2d), first], [bits, 8], "weight")
    return widths


def _write(result: tuple[Any, Tensor], folder: Path) -> None:
    """Operators that ONNX Runtime has; its other format, MCTQ, has some of its own.

    It passes arguments of PyTorch's older exporter, the default of the versions that it supports.
    """
    import model_compression_toolkit as mct

    model, image = result
    with patch.object(torch.onnx, "export", partial(torch.onnx.export, dynamo=False)):
        mct.exporter.pytorch_export_model(
            model,
            str(folder / "model.onnx"),
            lambda: iter([[image.numpy()]]),
            quantization_format=mct.exporter.QuantizationFormat.FAKELY_QUANT,
        )


def _read(folder: Path, network: nn.Module) -> Network:
    """Not optimized: what ONNX Runtime changes in the graph changes what is computed, as with AIMET's files."""
    return read_onnx(folder / "model.onnx", optimized=False)
