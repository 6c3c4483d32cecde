"""The memory format in which a network is trained."""

import torch
from torch import Tensor, nn

# The largest block of channels of oneDNN's convolutions, that of AVX-512.
BLOCK = 16


def lay_out(network: nn.Module) -> None:
    """Lay the weights of `network` out channels_last, in which convolutions are fastest, or contiguous where need be.

    Of a strided 1 x 1 convolution with few input channels, oneDNN computes channels_last gradients that are wrong, and
    writes past the end of its workspace (oneDNN issue 6035). A network with such a one is given contiguous images.
    """
    if not any(_few_channels_strided(module) for module in network.modules()):
        network.to(memory_format=torch.channels_last)
        return
    network.to(memory_format=torch.contiguous_format)
    if _contiguous not in network._forward_pre_hooks.values():
        network.register_forward_pre_hook(_contiguous)


def _few_channels_strided(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and tuple(module.kernel_size) == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < BLOCK
    )


def _contiguous(network: nn.Module, images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.contiguous() for each in images)
