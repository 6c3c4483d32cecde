"""torchao: PT2E with ExecuTorch's quantizer for XNNPACK, as ExecuTorch's documentation has it, and weights alone.

`IntxWeightOnlyConfig` is what torchao has for the weights of convolutions; it rounds, without images. The first and the
last layer have 8 bits there, as here.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.benchmarks.peers.setting import Network, Setting
from compress.export.executorch import ExecuTorchModel
from compress.export.xnnpack_graph import BATCH
from compress.models.baking import copied

INSTALL = "pip install torchao==0.18.0 executorch==1.5.1"
PACKAGES = ("torchao", "executorch")


def settings() -> dict[str, Setting]:
    """8 bits with inputs of 8, and 8, 4 and 2 bits of the weights alone."""
    import executorch.backends.xnnpack.quantizer.xnnpack_quantizer  # noqa: F401
    import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401

    static = Setting(8, 8, _static, _write_program, _read_program, ".pte for XNNPACK", "executorch")
    weights = {
        f"`IntxWeightOnlyConfig`, {bits} bit": Setting(
            bits, None, partial(_weights, bits), _write_state, _read_state, ".pt, `torch.save` of the state", "torch"
        )
        for bits in (8, 4, 2)
    }
    return {"PT2E, `XNNPACKQuantizer`": static} | weights


def _static(network: nn.Module, images: Tensor) -> tuple[Any, Tensor]:
    """The converted network, and images to export it with."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    network = network.to(memory_format=torch.contiguous_format)
    prepared = prepare_pt2e(_exported(network, images[:BATCH]).module(), quantizer)
    for part in images.split(BATCH):
        prepared(part)
    return convert_pt2e(prepared), images[:BATCH]


def _exported(network: nn.Module, example: Tensor) -> Any:
    """For 1 to BATCH images, of which there have to be as many in `example`."""
    batch = torch.export.Dim("batch", min=1, max=BATCH)
    return torch.export.export(network, (example,), dynamic_shapes=({0: batch},))


def _write_program(result: tuple[Any, Tensor], folder: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(_exported(*result), partitioner=[XnnpackPartitioner()])
    (folder / "model.pte").write_bytes(lowered.to_executorch().buffer)


def _read_program(folder: Path, network: nn.Module) -> Network:
    return ExecuTorchModel((folder / "model.pte").read_bytes())


def _weights(bits: int, network: nn.Module, images: Tensor) -> nn.Module:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_

    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    outer = {layers[0], layers[-1]}
    for width, chosen in ((8, outer), (bits, {*layers} - outer)):
        config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{width}"))
        quantize_(network, config, filter_fn=lambda _, name, chosen=chosen: name in chosen)
    return network


def _write_state(network: nn.Module, folder: Path) -> None:
    torch.save(network.state_dict(), folder / "model.pt")


def _read_state(folder: Path, network: nn.Module) -> Network:
    result = copied(network).eval()
    result.load_state_dict(torch.load(folder / "model.pt", weights_only=True), assign=True)
    return result
