"""Sony's Model Compression Toolkit, as its tutorials have it: PTQ, and GPTQ, which learns the rounding by gradients.

For its IMX500 platform: weights with a scale per channel, activations of 8 bits with scales that are powers of two.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from compress.benchmarks.peers.setting import Network, Setting

INSTALL = "pip install model-compression-toolkit==2.6.1 onnxruntime onnxruntime-extensions"
PACKAGES = ("model-compression-toolkit", "mct-quantizers")
BATCH = 32
EPOCHS = 50  # of the tutorial for GPTQ


def settings() -> dict[str, Setting]:
    """PTQ at 8, 4 and 2 bits, and GPTQ at 4 and 2; the first and the last layer have 8 bits, and inputs always."""
    import model_compression_toolkit  # noqa: F401

    ways = [("PTQ", bits, None) for bits in (8, 4, 2)] + [("GPTQ", bits, EPOCHS) for bits in (4, 2)]
    return {
        f"{name}, {bits} bit": Setting(
            bits, 8, partial(_quantized, bits, epochs), _write, _read, ".onnx of MCT's operators", "onnxruntime"
        )
        for name, bits, epochs in ways
    }


def _quantized(bits: int, epochs: int | None, network: nn.Module, images: Tensor) -> Any:
    """What its export takes: the network, and what yields the images."""
    import model_compression_toolkit as mct

    def batches() -> Iterator[list[Any]]:
        yield from ([part.numpy()] for part in images.split(BATCH))

    config = mct.core.CoreConfig(bit_width_config=_widths(network, bits))
    if epochs is None:
        model, _ = mct.ptq.pytorch_post_training_quantization(network, batches, core_config=config)
    else:
        model, _ = mct.gptq.pytorch_gradient_post_training_quantization(
            network, batches, core_config=config, gptq_config=mct.gptq.get_pytorch_gptq_config(n_epochs=epochs)
        )
    return model, batches


def _widths(network: nn.Module, bits: int) -> Any:
    """The width of all convolutions but the first, each of which has to have a BatchNorm behind it."""
    from model_compression_toolkit.core import BitWidthConfig
    from model_compression_toolkit.core.common.network_editors import NodeNameFilter

    config = BitWidthConfig()
    inner = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)][1:]
    if bits < 8:
        # What MCT calls a convolution into which it folded its BatchNorm.
        filters = [NodeNameFilter(f"{name.replace('.', '_')}_bn") for name in inner]
        config.set_manual_weights_bit_width(filters, bits, "weight")
    return config


def _write(result: tuple[Any, Callable[[], Any]], folder: Path) -> None:
    import model_compression_toolkit as mct

    model, batches = result
    # MCT asks for the export by TorchScript, as it was the default of the versions of torch that MCT is tested with.
    with mock.patch("torch.onnx.export", partial(torch.onnx.export, dynamo=False)):
        mct.exporter.pytorch_export_model(model.eval(), str(folder / "model.onnx"), batches)


def _read(folder: Path, network: nn.Module) -> Network:
    import mct_quantizers
    import onnxruntime

    options = mct_quantizers.get_ort_session_options()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, ["CPUExecutionProvider"])
    [port] = session.get_inputs()
    return lambda images: torch.from_numpy(session.run(None, {port.name: images.numpy()})[0])
