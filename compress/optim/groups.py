"""What an optimizer is given: parameters in groups, some of them without weight decay."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from compress.arguments import arguments_of, imported

# The key that every optimizer node has in addition to the arguments of the constructor.
DECAY = "decay_norm_and_bias"


@dataclass(frozen=True)
class OptimizerFactory:
    """`make(parameters)`, an optimizer; unless `decay_norm_and_bias`, with groups for what is not to decay."""

    make: Callable[..., Optimizer]
    decay_norm_and_bias: bool = True

    def __call__(self, parameters: Iterable[Any]) -> Optimizer:
        """`parameters` are tensors, or groups of them."""
        return self.make(parameters if self.decay_norm_and_bias else without_decay(parameters))


def optimizer_factory(node: Mapping[str, Any]) -> OptimizerFactory:
    """That of a plain `optimizer` node of the configuration, such as those in `conf/optimizer`."""
    options = {key: value for key, value in arguments_of(node).items() if key != DECAY}
    return OptimizerFactory(partial(imported(node["_target_"], "optimizer"), **options), node.get(DECAY, True))


def as_groups(parameters: Iterable[Any]) -> list[dict[str, Any]]:
    """Parameters, or groups of them, as groups."""
    given = list(parameters)
    groups = [group for group in given if isinstance(group, dict)] or [{"params": given}]
    return [group | {"params": list(group["params"])} for group in groups]


def divided(
    groups: Iterable[dict[str, Any]],
    belongs: Callable[[Tensor], bool],
    first: Mapping[str, Any],
    second: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Every group in two: the parameters that `belongs` accepts, with the options `first`, then the others.

    All first parts come before all second parts; parts without parameters are dropped.
    """
    parts = []
    for wanted, options in ((True, first), (False, second)):
        for group in groups:
            parameters = [parameter for parameter in group["params"] if belongs(parameter) == wanted]
            parts += [{**group, **options, "params": parameters}] if parameters else []
    return parts


def without_decay(parameters: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups in which what has at most one dimension, biases and the weights of norms, has a weight decay of 0."""
    return divided(as_groups(parameters), lambda parameter: parameter.ndim > 1, {}, {"weight_decay": 0.0})
