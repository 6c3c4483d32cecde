"""The memory format in which a network computes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.models.baking import copied
from compress.models.canonical import probe

# The largest block of channels of oneDNN's convolutions, that of AVX-512.
BLOCK = 16


def lay_out(network: nn.Module, input_shape: Sequence[int] | None = None) -> None:
    """Lay the weights of `network` out channels_last, in which convolutions are fastest, or contiguous where need be.

    Of a strided 1 x 1 convolution with few input channels, oneDNN computes channels_last gradients that are wrong, and
    writes past the end of its workspace (oneDNN issue 6035). A network with such a one is given contiguous images, and
    so is one whose forward fails for images of `input_shape`, (C, H, W), as one with a `view` may.
    """
    narrow = any(_few_channels_strided(module) for module in network.modules())
    if not narrow and (input_shape is None or _takes_channels_last(network, input_shape)):
        network.to(memory_format=torch.channels_last)
    else:
        network.to(memory_format=torch.contiguous_format)
        take_contiguous_images(network)


def take_contiguous_images(network: nn.Module) -> None:
    """Lets `network` make the images that it is called with contiguous."""
    if _contiguous not in network._forward_pre_hooks.values():
        network.register_forward_pre_hook(_contiguous)


def _takes_channels_last(network: nn.Module, input_shape: Sequence[int]) -> bool:
    """Whether the forward of `network` works in channels_last, in the mode that it is in."""
    trial = copied(network).to(memory_format=torch.channels_last)
    images = probe(trial, input_shape).contiguous(memory_format=torch.channels_last)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trial(images)
    except RuntimeError:
        return False
    return True


def _few_channels_strided(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and tuple(module.kernel_size) == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < BLOCK
    )


def _contiguous(network: nn.Module, images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.contiguous() for each in images)
