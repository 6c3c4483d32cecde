"""What the recipes share: which layers are pruned, when, and how the sparsity rises.

Zhu & Gupta 2017 (1710.01878) let it rise with the third power: `s_t = s_f (1 - (1 - (t - t_0) / (t_1 - t_0))^3)`.
"""

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from compress.errors import UserError
from compress.models.masks import attach, counted, layers, masks_of, narrow, weight_of

Epoch = Annotated[int, Field(ge=0)]


def cubic(progress: float) -> float:
    """The share of the final sparsity after the share `progress`, 0..1, of the schedule: `1 - (1 - progress)^3`."""
    return 1 - (1 - min(max(progress, 0.0), 1.0)) ** 3


@dataclass(frozen=True)
class Recipe(ABC):
    """A way to prune a network.

    `skip` names the layers that keep all their weights, or matches them by globs; with `skip_first_last` so do the
    first and the last one, in the order in which the network defines them.
    """

    skip: Sequence[str] = ()
    skip_first_last: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", tuple(self.skip))

    @property
    def name(self) -> str:
        """The option's word on the command line."""
        return type(self).__module__.rpartition(".")[2]

    def check(self, network: nn.Module, max_epochs: int, input_shape: tuple[int, int, int], role: str) -> None:
        """Raises UserError, in one line, where the recipe does not fit `network`, the `role` of the run."""
        self.chosen(network)

    def shrink(self, network: nn.Module, input_shape: tuple[int, int, int]) -> nn.Module:
        """What is trained in the place of the fresh `network`, which may be changed."""
        return network

    def pruned(self, network: nn.Module, input_shape: tuple[int, int, int]) -> nn.Module:
        """`network`, which may be changed, as it is once pruning is complete, without any training."""
        return self.shrink(network, input_shape)

    def chosen(self, network: nn.Module) -> dict[str, nn.Module]:
        """The layers that are pruned, by name. Raises UserError for a `skip` that matches no layer."""
        known = layers(network)
        names = list(known)
        skipped = set(names[:1] + names[-1:]) if self.skip_first_last else set()
        for pattern in self.skip:
            matches = fnmatch.filter(names, pattern)
            if not matches:
                raise UserError(
                    f"pruning.skip: found {pattern!r}, which matches no layer; accepted: {', '.join(names)}"
                )
            skipped.update(matches)
        return {name: layer for name, layer in known.items() if name not in skipped}

    @abstractmethod
    def record(self, trained: nn.Module) -> dict[str, Any]:
        """What `result.json` says of the network that was `trained` and has its masks."""


@dataclass(frozen=True)
class MaskRecipe(Recipe):
    """A recipe that holds weights at zero by masks.

    `when`: at the `start`, before the first step; in a `schedule`, cubic from the beginning of epoch `start_epoch` to
    that of `end_epoch` (None: half of all, rounded up), every `interval` batches; or `after` training, which here is
    before the last `finetune_epochs` of it, so that runs of equal `trainer.max_epochs` cost the same.
    """

    when: Literal["start", "schedule", "after"] = "schedule"
    start_epoch: Epoch = 0
    end_epoch: Annotated[int, Field(ge=1)] | None = None
    interval: Annotated[int, Field(ge=1)] = 10
    finetune_epochs: Epoch = 1

    @abstractmethod
    def masks(self, weights: Mapping[str, Tensor], current: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """Masks for the `weights` at the `share`, 0..1, of the final sparsity; `current` has the masks so far.

        All by layer and in the shapes of the weights; a mask is boolean, False for a weight that is dropped.
        """

    def pruned(self, network: nn.Module, input_shape: tuple[int, int, int]) -> nn.Module:
        attach(network, self.pruned_layers(network))
        self.prune(network, 1.0)
        return network

    def prune(self, network: nn.Module, share: float) -> None:
        """Takes weights from the masks of `network` up to the `share`, 0..1, of the final sparsity."""
        masks = masks_of(network)
        current = {name: masks[name] for name in self.pruned_layers(network)}
        weights = {name: weight_of(network.get_submodule(name)) for name in current}
        narrow(network, self.masks(weights, current, share))

    def unfit(self, chosen: Mapping[str, nn.Module]) -> dict[str, str]:
        """Those of the `chosen` layers that the recipe cannot prune, and why."""
        return {}

    def dense(self, network: nn.Module) -> dict[str, str]:
        """The layers without a mask, and why: those that the options skip, and the unfit."""
        chosen = self.chosen(network)
        return {name: "skipped" for name in layers(network) if name not in chosen} | self.unfit(chosen)

    def pruned_layers(self, network: nn.Module) -> list[str]:
        """The names of the layers that get a mask."""
        dense = self.dense(network)
        return [name for name in layers(network) if name not in dense]

    def record(self, trained: nn.Module) -> dict[str, Any]:
        by_layer = counted(trained)
        pruned, weights = (sum(counts[key] for counts in by_layer.values()) for key in ("pruned", "weights"))
        total = {"weights": weights, "pruned": pruned, "sparsity": pruned / weights}
        return {"recipe": self.name, **total, "layers": by_layer, "dense": self.dense(trained)}

    def window(self, max_epochs: int) -> tuple[int, int]:
        """The epochs, counted from 0, at whose beginnings pruning begins and ends; `max_epochs`: after the last."""
        if self.when == "start":
            return 0, 0
        if self.when == "after":
            return (max_epochs - self.finetune_epochs,) * 2
        return self.start_epoch, -(-max_epochs // 2) if self.end_epoch is None else self.end_epoch

    def check(self, network: nn.Module, max_epochs: int, input_shape: tuple[int, int, int], role: str) -> None:
        dense = self.dense(network)
        if len(dense) == len(layers(network)):
            why = next(iter(dense.values()), "it has neither a convolution nor a linear layer")
            raise UserError(
                f"pruning: found {self.name}, which has nothing to prune in this {role} ({why}); accepted: "
                "pruning=none, or a recipe that fits"
            )
        first, last = self.window(max_epochs)
        if self.when == "after" and first < 1:
            raise UserError(
                f"pruning.finetune_epochs: found {self.finetune_epochs} of {max_epochs} epochs; accepted: 0 to "
                f"{max_epochs - 1}, fewer than trainer.max_epochs"
            )
        if last > max_epochs:
            raise UserError(
                f"pruning.end_epoch: found {last}, which is after the last of {max_epochs} epochs; accepted: 1 to "
                f"{max_epochs}, at most trainer.max_epochs"
            )
        if self.when == "schedule" and first >= last:
            raise UserError(f"pruning.start_epoch: found {first} with the end at {last}; accepted: 0 to {last - 1}")

    def share(self, batches: int, per_epoch: int, max_epochs: int) -> float | None:
        """The share of the final sparsity to prune to after so many `batches` of training; None: masks stay."""
        first, last = (epoch * per_epoch for epoch in self.window(max_epochs))
        if batches == last:
            return 1.0
        if not first < batches < last or (batches - first) % self.interval:
            return None
        return cubic((batches - first) / (last - first))
