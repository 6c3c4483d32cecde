"""Which of the tensors that a network returns are its logits."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress.errors import UserError
from compress.models.baking import copied

NAMES = ("logits", "out")


def logits(output: Any, num_classes: int | None = None) -> Tensor:
    """The logits `(B, num_classes)` in what a network returns: a tensor, or one in a tuple, a mapping or named fields.

    The entry called `logits` or `out` counts; without one, the first `(B, num_classes)`, of any number of classes where
    that is None. Raises UserError where there is none.
    """
    if isinstance(output, Tensor):
        candidates = [output]
    else:
        named = [output.get(name) if isinstance(output, Mapping) else getattr(output, name, None) for name in NAMES]
        leaves = tree_leaves(output) if isinstance(output, Mapping | Sequence) else []
        candidates = [*named, *(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() == 2)]
    for candidate in candidates:
        if isinstance(candidate, Tensor) and (num_classes is None or candidate.shape[1:] == (num_classes,)):
            return candidate
    wanted = "(images, classes)" if num_classes is None else f"(images, {num_classes})"
    raise UserError(
        f"found a network that returns {_described(output)}; accepted: logits {wanted}, alone or among others"
    )


def returning_logits(network: nn.Module, num_classes: int | None = None) -> nn.Module:
    """`network` itself, which from now on returns its logits alone, see `logits`."""
    network.register_forward_hook(partial(_logits_alone, num_classes))
    return network


def has_idle_parameters(network: nn.Module, input_shape: Sequence[int]) -> bool:
    """Whether there are parameters on which the logits do not depend in training, such as an auxiliary head's.

    `input_shape` is `(C, H, W)`; `network` stays as it is.
    """
    copy = copied(network).cpu().train()
    learnt = [parameter for parameter in copy.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        images = torch.randn(2, *input_shape, dtype=learnt[0].dtype)
        gradients = torch.autograd.grad(logits(copy(images)).sum(), learnt, allow_unused=True)
    return any(gradient is None for gradient in gradients)


def _logits_alone(num_classes: int | None, network: nn.Module, arguments: tuple[Any, ...], output: Any) -> Tensor:
    return logits(output, num_classes)


def _described(output: Any) -> str:
    leaves = [
        str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in tree_leaves(output)
    ]
    if isinstance(output, Tensor):
        return f"a tensor {leaves[0]}"
    return f"a {type(output).__name__} of {', '.join(leaves[:4]) or 'nothing'}{' ...' if len(leaves) > 4 else ''}"
