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
        leaves = tree_leaves(output) if isinstance(output, Mapping | Sequence) else []
        candidates = [*_named(output), *(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() == 2)]
    for candidate in candidates:
        if isinstance(candidate, Tensor) and (num_classes is None or candidate.shape[1:] == (num_classes,)):
            return candidate
    wanted = "(images, classes)" if num_classes is None else f"(images, {num_classes})"
    raise UserError(
        f"found a network that returns {_described(output)}; accepted: logits {wanted}, alone or among others"
    )


def finding_logits(network: nn.Module, images: Tensor) -> nn.Module:
    """`network` itself, if it is clear which of its outputs are logits, else a copy that returns its logits alone.

    Of outputs `(B, width)` without a name and of several widths, those are features that another one is computed from.
    `images` (B, C, H, W) are in the type and on the device of `network`. A forward that fails is left to whoever can
    say more of it. Raises UserError where several could be its logits.
    """
    plain = copied(network).eval()
    try:
        with torch.enable_grad():
            output = plain(images.detach().requires_grad_().clone())
    except Exception:  # a forward of the user's can fail with anything
        return network
    first = logits(output)
    if any(first is value for value in _named(output)) or isinstance(output, Tensor):
        return network
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.dim() == 2]
    sources = [_functions_before(leaf) for leaf in leaves]
    ends = [leaf for leaf in leaves if not any(leaf.grad_fn in before for before in sources)]
    widths = {leaf.shape[1] for leaf in ends}
    found = next((leaf for leaf in leaves if leaf.shape[1] in widths), None)
    if len(widths) != 1 or not any(found is leaf for leaf in ends):
        raise UserError(
            f"found a network that returns {_described(output)}, more than one of which could be its logits; accepted: "
            "logits alone, or called logits in a mapping"
        )
    return returning_logits(plain.train(network.training), *widths)


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


def _named(output: Any) -> list[Any]:
    return [output.get(name) if isinstance(output, Mapping) else getattr(output, name, None) for name in NAMES]


def _functions_before(tensor: Tensor) -> set[Any]:
    """The functions of autograd that computed what `tensor` is computed from."""
    found: set[Any] = set()
    pending = [tensor.grad_fn]
    while pending:
        function = pending.pop()
        functions = () if function is None else function.next_functions
        before = {next for next, _ in functions if next is not None}
        pending.extend(before - found)
        found |= before
    return found


def _described(output: Any) -> str:
    leaves = [
        str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in tree_leaves(output)
    ]
    if isinstance(output, Tensor):
        return f"a tensor {leaves[0]}"
    return f"a {type(output).__name__} of {', '.join(leaves[:4]) or 'nothing'}{' ...' if len(leaves) > 4 else ''}"
