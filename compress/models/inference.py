"""A network made ready to be called as a fixed function: a teacher, or a model that is evaluated."""

import copy

import torch
from torch import nn

from compress.errors import UserError
from compress.models.folding import fold_batch_norm


def frozen_for_inference(model: nn.Module) -> nn.Module:
    """A copy in eval mode, without gradients, its BatchNorm folded, laid out channels_last; `model` stays as it is.

    Its logits are those of `model` in eval mode up to the rounding of the folded weights.
    """
    try:
        frozen = fold_batch_norm(model)
    except UserError:
        # torch.fx cannot follow every foreign network, and a teacher needs folding for its speed alone.
        frozen = copy.deepcopy(model)
    return frozen.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def low_precision_dtype(device: torch.device | str) -> torch.dtype | None:
    """bfloat16 where `device` computes in it, None where it would only imitate it.

    A CPU without AVX-512 BF16 or AMX BF16 is many times slower in bfloat16 than in float32.
    """
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        with torch.cuda.device(device):
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        supported = device.type == "cpu" and _cpu_computes_bfloat16()
    return torch.bfloat16 if supported else None


def _cpu_computes_bfloat16() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        flags = capabilities()
        return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))
    # Earlier PyTorch; a processor with AMX BF16 has AVX-512 BF16 as well, so this one flag is enough.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and bool(supported())
