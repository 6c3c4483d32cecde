"""Structured pruning: whole channels go, and the network really shrinks, before it is trained.

Torch-Pruning finds which layers share a channel and chooses the channels of least norm (Fang et al. 2023,
2301.12900). What it leaves is described by `compress.models.channels`, so that files can be read without it.
"""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from compress.errors import UserError
from compress.models import masks
from compress.models.channels import Channels, changed_channels, channels, last_linear, with_channels
from compress.models.masks import layers
from compress.pruning.recipe import Recipe


@dataclass(frozen=True)
class Structured(Recipe):
    """`pruning=structured`: the share `ratio` of the channels of every layer goes; the classes stay.

    `round_to`: a layer's remaining channels are a multiple of it, rounded up. A layer that is skipped keeps its output
    channels.
    """

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    round_to: Annotated[int, Field(ge=1)] | None = None

    def check(self, network: nn.Module, max_epochs: int, input_shape: tuple[int, int, int], role: str) -> None:
        if find_spec("torch_pruning") is None:
            raise UserError(
                "pruning: found structured, but torch-pruning is not installed; pip install 'compress[pruning]'"
            )
        self.shrink(copy.deepcopy(network), input_shape, role)

    def shrink(self, network: nn.Module, input_shape: tuple[int, int, int], role: str = "student") -> nn.Module:
        """`network` without the channels; its parameters are new ones. Layers that had masks get masks of their zeros.

        Raises UserError where that cannot be done.
        """
        pruned = self.chosen(network)
        if (classifier := last_linear(network)) is not None:
            pruned.pop(classifier, None)
        self._check_ratio(pruned)
        ignored = [layer for name, layer in layers(network).items() if name not in pruned]
        masked = list(masks.masks_of(network))
        masks.remove(network)
        fresh = copy.deepcopy(network)
        training = network.training
        try:
            with warnings.catch_warnings(action="ignore"):
                self._prune(network.eval(), ignored, input_shape)
                changed = changed_channels(network, fresh)
                same = _as_described(network, fresh, changed, input_shape)
        except UserError:
            raise
        except Exception as failure:  # Torch-Pruning fails with whatever its arithmetic meets
            raise UserError(_unsupported(network, role, str(failure) or type(failure).__name__)) from None
        if not changed:
            raise UserError(f"pruning: found structured, which has nothing to prune in this {role}; accepted: none")
        if not same:
            raise UserError(_unsupported(network, role, "it changes more than the channels of known layers"))
        masks.mask_zeros(network, masked)
        return network.train(training)

    def _check_ratio(self, pruned: Mapping[str, nn.Module]) -> None:
        for name, layer in pruned.items():
            outputs = masks.weight_of(layer).shape[0]
            if not self.round_to and int(outputs * (1 - self.ratio)) < 1:
                raise UserError(
                    f"pruning.ratio: found {self.ratio}, which leaves none of the {outputs} channels of {name}; "
                    f"accepted: at most {(outputs - 1) / outputs:.4g}"
                )

    def _prune(self, network: nn.Module, ignored: list[nn.Module], input_shape: tuple[int, int, int]) -> None:
        import torch_pruning

        torch_pruning.pruner.BasePruner(
            network,
            torch.zeros(1, *input_shape, device=next(network.parameters()).device),
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=self.ratio,
            ignored_layers=ignored,
            round_to=self.round_to,
        ).step()

    def record(self, trained: nn.Module) -> dict[str, Any]:
        return {"recipe": self.name, "channels": channels(trained)}


def _unsupported(network: nn.Module, role: str, reason: str) -> str:
    return (
        f"pruning: found structured, which Torch-Pruning cannot do for this {role}, {type(network).__name__} "
        f"({reason.splitlines()[0]}); accepted: pruning=magnitude, or another network"
    )


@torch.no_grad()
def _as_described(network: nn.Module, fresh: nn.Module, widths: Channels, input_shape: tuple[int, int, int]) -> bool:
    """Whether `fresh` with the channels `widths` and the weights of `network`, in eval mode, computes the same."""
    again = with_channels(fresh, widths).eval()
    again.load_state_dict(network.state_dict())
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, *input_shape, generator=generator).to(next(network.parameters()).device)
    same = torch.equal(again(images), network(images))
    again.train()(images)  # fails where a part that only training calls, such as an auxiliary head, was not shrunk too
    return same
