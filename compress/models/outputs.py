"""Which of the tensors that a network returns are its logits."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress.errors import UserError

NAMES = ("logits", "out")


def logits(output: Any, num_classes: int | None = None) -> Tensor:
    """The logits `(B, num_classes)` in what a network returns: a tensor, or one in a tuple, a mapping or named fields.

    The entry called `logits` or `out` counts; without one, the first `(B, num_classes)`, of any number of classes where
    that is None. Raises UserError where there is none.
    """
    if isinstance(output, Tensor):
        return output
    for name in NAMES:
        named = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(named, Tensor):
            return named
    if isinstance(output, Mapping | Sequence):
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.dim() == 2 and num_classes in (None, leaf.shape[1]):
                return leaf
    wanted = "(images, classes)" if num_classes is None else f"(images, {num_classes})"
    raise UserError(
        f"found a network that returns {_described(output)}; accepted: logits {wanted}, alone or among others"
    )


def returning_logits(network: nn.Module, num_classes: int | None = None) -> nn.Module:
    """`network` itself, which from now on returns its logits alone, see `logits`."""
    network.register_forward_hook(lambda module, arguments, output: logits(output, num_classes))
    return network


def _described(output: Any) -> str:
    leaves = [
        str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in tree_leaves(output)
    ]
    return f"a {type(output).__name__} of {', '.join(leaves[:4]) or 'nothing'}{' ...' if len(leaves) > 4 else ''}"
