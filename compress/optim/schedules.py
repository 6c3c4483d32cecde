"""Learning-rate schedules: factors on the base rate as pure functions of the training step.

A pure function has no state to lose: a resumed run has the rate of the undisturbed one at every step.
"""

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Fraction = Annotated[float, Field(ge=0, le=1)]
Epochs = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up over `warmup_epochs`, then the subclass's `factor`; here a constant rate (`scheduler=none`)."""

    warmup_epochs: Epochs = 0.0

    def factor(self, epoch: float, epochs: float) -> float:
        """The factor at `epoch` (a fraction counts) of `epochs`, both measured from the end of the warm-up."""
        return 1.0

    def __call__(self, optimizer: Optimizer, steps_per_epoch: int, epochs: int) -> LambdaLR:
        """A scheduler to be stepped after every optimizer step."""
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)

        def at(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            done = (step - warmup_steps) / steps_per_epoch
            return self.factor(done, max(epochs - warmup_steps / steps_per_epoch, 1 / steps_per_epoch))

        return LambdaLR(optimizer, at)


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from 1 to `minimum` (Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983)."""

    minimum: Fraction = 0.0

    def factor(self, epoch: float, epochs: float) -> float:
        return self.minimum + (1 - self.minimum) * (1 + math.cos(math.pi * min(epoch / epochs, 1))) / 2


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line from 1 to `minimum`."""

    minimum: Fraction = 0.0

    def factor(self, epoch: float, epochs: float) -> float:
        return 1 - (1 - self.minimum) * min(epoch / epochs, 1)


@dataclass(frozen=True, kw_only=True)
class Multistep(Schedule):
    """Times `gamma` at the start of every one of the `milestones`, epochs counted from the start of training."""

    milestones: list[Annotated[int, Field(ge=1)]]
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1

    def factor(self, epoch: float, epochs: float) -> float:
        # Half a thousandth of an epoch absorbs the rounding of step / steps_per_epoch.
        return self.gamma ** sum(epoch + self.warmup_epochs + 5e-4 >= milestone for milestone in self.milestones)


@dataclass(frozen=True, kw_only=True)
class Exponential(Schedule):
    """Times `gamma` after every epoch."""

    gamma: Annotated[float, Field(gt=0, le=1)] = 0.95

    def factor(self, epoch: float, epochs: float) -> float:
        return self.gamma ** math.floor(epoch + 5e-4)


@dataclass(frozen=True, kw_only=True)
class OneCycle(Schedule):
    """Up from `1 / initial_divisor` to 1 over `rise` of the run and down to `1 / final_divisor`, both as cosines.

    Smith & Topin 2018, https://arxiv.org/abs/1708.07120; the momentum stays as it is.
    """

    rise: Annotated[float, Field(gt=0, lt=1)] = 0.3
    initial_divisor: Annotated[float, Field(ge=1)] = 25.0
    final_divisor: Annotated[float, Field(ge=1)] = 1e4

    def factor(self, epoch: float, epochs: float) -> float:
        progress = min(epoch / epochs, 1)
        if progress < self.rise:
            start, end, way = 1 / self.initial_divisor, 1.0, progress / self.rise
        else:
            start, end, way = 1.0, 1 / self.final_divisor, (progress - self.rise) / (1 - self.rise)
        return end + (start - end) * (1 + math.cos(math.pi * way)) / 2
