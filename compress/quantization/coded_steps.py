"""Training for few coded bits: one learned step a layer, as many codes as it needs, and the bits in the loss.

What is minimised is `loss + price * rate`, the rate being the coded bits of a weight in the mean. Where an entropy
coder follows, a code of frequency p takes -log2 p bits. Frequencies are counted anew in every step of the training. The
bits of a weight between two codes are interpolated, which gives the gradient that draws weights towards more frequent
codes. Rounding itself passes gradients straight through, as in `compress.quantization.lsq`.

All steps are stretched together so that the rate is the one that is due. That leaves the price: where loss and rate are
in balance, stretching all steps by a little costs as much loss as the bits that it saves are worth. So the price is the
loss that this costs over the bits, both of which the gradients of the steps tell.
"""

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.quantization.grid import Grid, code_dtype
from compress.quantization.learned_step import check_finite, fake_quantize
from compress.quantization.rate_distortion import entropy

# More would need more codes than there are.
Rate = Annotated[float, Field(ge=0.1, le=6)]
# Codes lie in -LARGEST..LARGEST. A weight that wants more costs as many bits as the last.
LARGEST = 127
# How much oftener than it is seen each code counts: all of them together by one weight.
UNSEEN = 1 / (2 * LARGEST + 1)
# The first step, in deviations of the layer's weights: about 3 bits a weight.
FIRST_STEP = 0.5
# The share of the training at whose end the rate is to be reached, and that from whose end on it counts as reached.
REACHED, SETTLED = 0.5, 0.8
# By how much of what would be right at high rates the steps are stretched at a time.
PULL = 0.1
# Over about how many steps of the training the price is averaged.
MEMORY = 50


class CodedStep(nn.Module):
    """A parametrization of weights (N, ...): multiples of one learned step, whose logarithm is the parameter."""

    largest: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        deviation = weight.detach().float().square().mean().sqrt()
        self.log_step = nn.Parameter(torch.where(deviation > 0, FIRST_STEP * deviation, 1.0).log())
        self.register_buffer("largest", torch.tensor(float(LARGEST)), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight, self.log_step.exp(), -self.largest, self.largest, 1.0)

    def bits(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of all codes of `weight` at their own frequencies.

        Interpolated, with gradients of the weight alone; as they are; and how the first changes with the logarithm of
        the step.
        """
        scaled = (weight.float() / self.log_step.detach().exp()).clamp(-self.largest, self.largest).flatten()
        values = scaled.detach()
        counts = values.new_zeros(2 * LARGEST + 1)
        counts.scatter_add_(0, values.round().long() + LARGEST, torch.ones_like(values))
        seen = counts + UNSEEN
        lengths = -(seen / seen.sum()).log2()
        below = values.floor().clamp_max(LARGEST - 1)
        places = below.long() + LARGEST
        slopes = lengths.diff()[places]
        interpolated = (lengths[places] + slopes * (scaled - below)).sum()
        exact = -torch.special.xlogy(counts, counts / len(values)).sum() / math.log(2)
        return interpolated, exact, -(slopes * values).sum()

    def codes(self, weight: Tensor, name: str) -> tuple[Tensor, Grid, float]:
        """Codes (N, ...) of `weight`, a grid of as many levels as they need, and the coded bits of one in the mean.

        Zero is in the middle of the levels, so that mirrored codes are codes of the same grid.
        """
        step = self.log_step.detach().float().exp()
        check_finite(name, weight, step)
        multiples = (weight.detach().float() / step).clamp(-self.largest, self.largest).round()
        largest = max(1, int(multiples.abs().max()))
        grid = Grid(
            step.expand(len(weight)).contiguous(),
            torch.full((len(weight),), largest, dtype=torch.int32, device=weight.device),
            2 * largest + 1,
        )
        return (multiples + largest).to(code_dtype(grid.levels)), grid, entropy([multiples]) / weight.numel()


class CodedBits(NamedTuple):
    """Of a weight in the mean over a network: interpolated, with gradients of the weights, and as they are.

    steps: those of its layers; slopes (layers,): how the interpolated bits change with the logarithms of these.
    """

    interpolated: Tensor
    exact: Tensor
    steps: list[CodedStep]
    slopes: Tensor


def coded_bits(weights: Sequence[tuple[CodedStep, Tensor]]) -> CodedBits:
    """The bits of all `weights` with their steps."""
    interpolated, exact, slopes = zip(*[step.bits(weight) for step, weight in weights], strict=True)
    count = sum(weight.numel() for _, weight in weights)
    mean = torch.stack(interpolated).sum() / count, torch.stack(exact).sum() / count
    return CodedBits(*mean, [step for step, _ in weights], torch.stack(slopes) / count)


class RateTraining(nn.Module):
    """What brings the rate of a training down to `rate` bits a weight, and the `price` of a bit meanwhile.

    Due is what lies between the rate before the training and the one wanted, on a straight line of logarithms that ends
    after the share REACHED of the training. The state is in buffers, so that a resumed training goes on with the same.
    """

    price: Tensor
    of_loss: Tensor
    of_rate: Tensor
    first_rate: Tensor
    taken: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        for name in ("price", "of_loss", "of_rate", "first_rate", "taken"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def before_step(self, bits: CodedBits) -> None:
        """Sets the price by the gradients of the steps, which are so far of the loss alone, and adds those of the rate.

        Gradients that are not finite, with which no step is taken, change nothing.
        """
        gradients = [step.log_step.grad for step in bits.steps]
        known = torch.stack([torch.zeros(()).to(bits.slopes) if each is None else each for each in gradients])
        usable = torch.isfinite(known).all()
        self.of_loss.lerp_(torch.where(usable, known.sum(), self.of_loss), 1 / MEMORY)
        self.of_rate.lerp_(torch.where(usable, -bits.slopes.sum(), self.of_rate), 1 / MEMORY)
        self.price.copy_(torch.where(self.of_rate > 0, self.of_loss / self.of_rate, 0.0).clamp_min(0))
        for gradient, slope in zip(gradients, bits.slopes, strict=True):
            if gradient is not None:
                gradient.add_(self.price * slope)

    @torch.no_grad()
    def after_step(self, bits: CodedBits, steps: int) -> None:
        """Stretches the steps of the layers after one of all `steps` of the training."""
        self.first_rate.copy_(torch.where(self.first_rate > 0, self.first_rate, bits.exact))
        self.taken.add_(1)
        left = (1 - self.taken / (REACHED * steps)).clamp_min(0)
        due = self.rate * (self.first_rate / self.rate).clamp_min(1) ** left
        # At high rates a step that is twice as long saves a bit.
        stretch = PULL * math.log(2) * (bits.exact - due)
        for step in bits.steps:
            step.log_step.add_(stretch)
