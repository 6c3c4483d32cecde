"""torchao, as ExecuTorch's guide has it for XNNPACK: PT2E with the `XNNPACKQuantizer`, and what it leaves as a `.pte`.

Weights have a scale per channel, and inputs the ranges of its default observers.
"""

from pathlib import Path

from torch import Tensor, nn

from compress.benchmarks.peers.setting import Network, Setting
from compress.export.executorch import ExecuTorchModel
from compress.export.xnnpack_graph import BATCH, exported

INSTALL = "pip install executorch==1.5.1 torchao==0.18.0"
PACKAGES = ("torchao", "executorch")


def settings() -> dict[str, Setting]:
    """8 bits with inputs of 8. `quantize_`, which has weights alone, leaves convolutions as they are."""
    import torchao  # noqa: F401
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer  # noqa: F401

    return {"PT2E, 8 bit": Setting(8, 8, _quantized, _write, _read, ".pte for XNNPACK", "executorch")}


def _quantized(network: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    """The quantized network, and an image for the shape that it is exported with.

    `exported` has contiguous images as its example. A program of ExecuTorch 1.5.1 takes the layout of memory from the
    example and does not check what it is given: the calibration images, which are channels-last, would make one that
    has three quarters of contiguous images wrong.
    """
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    graph = exported(network, images.shape[1:]).module(check_guards=False)
    prepared = prepare_pt2e(graph, quantizer)
    for part in images.split(BATCH):
        prepared(part)
    return convert_pt2e(prepared), images[:1]


def _write(result: tuple[nn.Module, Tensor], folder: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    model, image = result
    lowered = to_edge_transform_and_lower(exported(model, image.shape[1:]), partitioner=[XnnpackPartitioner()])
    (folder / "model.pte").write_bytes(lowered.to_executorch().buffer)


def _read(folder: Path, network: nn.Module) -> Network:
    return ExecuTorchModel((folder / "model.pte").read_bytes())
