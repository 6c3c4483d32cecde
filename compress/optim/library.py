"""Optimizers of pytorch-optimizer, the optional extra `optim`, for the networks here."""

from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Annotated, Any

from pydantic import Field
from torch.optim import Optimizer

from compress.arguments import BelowOne, Count, NotNegative, Positive
from compress.optim.groups import as_groups, divided
from compress.optim.kronecker import fold

Betas = Annotated[Sequence[BelowOne], Field(min_length=2, max_length=2)]


def soap(
    params: Iterable[Any],
    lr: Positive = 3e-3,
    betas: Betas = (0.95, 0.95),
    weight_decay: NotNegative = 0.01,
    precondition_frequency: Count = 10,
    max_precondition_dim: Count = 4096,
    eps: Positive = 1e-8,
) -> Optimizer:
    """Adam in the eigenbasis of Shampoo (Vyas et al. 2024, https://arxiv.org/abs/2409.11321).

    Every side of a weight, all four of a convolution's `(out, in, kh, kw)`, has its basis, which is renewed every
    `precondition_frequency` steps, unless it is longer than `max_precondition_dim`. Adam updates vectors. The
    first step gathers statistics and moves nothing. Weight decay is decoupled.

    Raises ImportError where pytorch-optimizer is not installed.
    """
    optimizer: Optimizer = _pytorch_optimizer().SOAP(
        as_groups(params),
        lr=lr,
        betas=tuple(betas),
        weight_decay=weight_decay,
        precondition_frequency=precondition_frequency,
        max_precondition_dim=max_precondition_dim,
        eps=eps,
    )
    return optimizer


def muon(
    params: Iterable[Any],
    lr: Positive = 0.02,
    momentum: BelowOne = 0.95,
    weight_decay: NotNegative = 0.01,
    nesterov: bool = True,
    ns_steps: Count = 5,
    adamw_lr: Positive = 1e-3,
    adamw_betas: Betas = (0.9, 0.999),
    adamw_eps: Positive = 1e-8,
) -> Optimizer:
    """Momentum made orthogonal by Newton and Schulz's iteration (Jordan 2024, https://kellerjordan.github.io/posts/muon).

    Convolutions count as matrices `(out, in*kh*kw)`. Biases, the weights of norms and all else that is a vector then
    go to AdamW with `adamw_lr`, which the schedule scales as it does `lr`; the decoupled `weight_decay` is for both.

    Raises ImportError where pytorch-optimizer is not installed.
    """
    library = _pytorch_optimizer()
    groups = [{"weight_decay": weight_decay} | group for group in as_groups(params)]
    groups = divided(groups, lambda parameter: fold(parameter.shape)[2] == 2, {"use_muon": True}, {"use_muon": False})
    optimizer: Optimizer = library.Muon(
        groups,
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        ns_steps=ns_steps,
        adamw_lr=adamw_lr,
        adamw_betas=tuple(adamw_betas),
        adamw_eps=adamw_eps,
    )
    return optimizer


def _pytorch_optimizer() -> ModuleType:
    try:
        import pytorch_optimizer
    except ImportError:
        raise ImportError(
            "found one of pytorch-optimizer, which is not installed; pip install 'compress[optim]'"
        ) from None
    return pytorch_optimizer
