"""A network made ready to be called as a fixed function: a teacher, or a model that is evaluated."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from compress.errors import UserError
from compress.models.baking import bake, copied
from compress.models.canonical import LAYERS, TOLERANCE, canonical, difference, probe
from compress.models.folding import find_foldable, fold_pairs
from compress.models.memory_format import lay_out
from compress.models.outputs import logits


@contextlib.contextmanager
def full_float32(repeatable: bool = False) -> Iterator[None]:
    """Within it, or in a function that it decorates, GPUs do not round the operands of convolutions to TF32.

    repeatable: and convolutions and their gradients have the same bits in every call.
    """
    cudnn = torch.backends.cudnn
    benchmark, deterministic = cudnn.benchmark and not repeatable, cudnn.deterministic or repeatable
    # What is not named here would be set to a default of its own; that of `enabled` is off.
    with cudnn.flags(cudnn.enabled, benchmark, deterministic=deterministic, allow_tf32=False):
        yield


@full_float32()
def frozen_for_inference(model: nn.Module, input_shape: Sequence[int]) -> nn.Module:
    """A copy for images (C, H, W), in eval mode, without gradients, BatchNorm folded, laid out by `lay_out`.

    Its modules keep their places and names, and its logits are those of `model` in eval mode up to the rounding of the
    folded weights. `model` stays as it is.
    """
    frozen = bake(copied(model).eval())
    with torch.no_grad():
        images = probe(frozen, input_shape)
        expected = logits(frozen(images.clone()))
        folded = copied(frozen)
        _fold(folded, input_shape)
        # A function may read the tensors of a norm that is no longer there.
        with contextlib.suppress(AttributeError):
            if difference(logits(folded(images)), expected) <= TOLERANCE:
                frozen = folded
    lay_out(frozen.requires_grad_(False), input_shape)
    return frozen


def _fold(network: nn.Module, input_shape: Sequence[int]) -> None:
    """Folds in `network` itself what folds in its canonical form and is a plain layer and norm under these names."""
    try:
        pairs = find_foldable(canonical(network, input_shape))
    except UserError:
        return  # not every foreign network can be traced, and folding only saves time
    modules = dict(network.named_modules())
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
    pairs = [pair for pair in pairs if type(modules.get(pair[0])) in LAYERS and type(modules.get(pair[1])) in norms]
    # A norm that has another name too is one there as well.
    folded = {id(modules[norm]) for _, norm in pairs}
    aliases = [name for name, module in network.named_modules(remove_duplicate=False) if id(module) in folded]
    fold_pairs(network, pairs)
    for name in aliases:
        network.set_submodule(name, nn.Identity().eval())


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
