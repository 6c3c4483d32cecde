"""The size of a network in parameters and in multiply-accumulates."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """The number of values in the parameters; a shared one counts once, buffers such as running means do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image of `input_shape`, `(C, H, W)`."""
    # Attention as plain matrix products: the counter does not know the fused kernels of the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run_once(model, input_shape)
    flops: int = counter.get_total_flops()
    return flops // 2  # the counter takes a multiplication and an addition as two


@torch.no_grad()
def run_once(model: nn.Module, input_shape: Sequence[int]) -> None:
    """Runs `model` in eval mode for a black image of `input_shape`, `(C, H, W)`; afterwards the model is as before."""
    tensors = (tensor for tensor in chain(model.parameters(), model.buffers()) if tensor.is_floating_point())
    like = next(tensors, torch.empty(0))
    images = torch.zeros(1, *input_shape, device=like.device, dtype=like.dtype)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        model(images)
    finally:
        for module in training:
            module.training = True
