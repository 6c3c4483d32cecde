"""The size of a network in parameters and in multiply-accumulates."""

from itertools import chain

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """The number of values in the parameters; a shared one counts once, buffers such as running means do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image of `input_shape`, `(C, H, W)`.

    Runs the model once in eval mode on the device of its parameters; afterwards it is as before.
    """
    tensors = (tensor for tensor in chain(model.parameters(), model.buffers()) if tensor.is_floating_point())
    like = next(tensors, torch.empty(0))
    images = torch.zeros(1, *input_shape, device=like.device, dtype=like.dtype)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # Attention as plain matrix products: the counter does not know the fused kernels of the CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(images)
    finally:
        for module, flag in training.items():
            module.training = flag
    return counter.get_total_flops() // 2  # the counter takes a multiplication and an addition as two
