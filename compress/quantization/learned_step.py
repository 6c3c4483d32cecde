"""Rounding to multiples of a step that is learned: Esser et al. 2020 (1902.08153), equations 1 to 3."""

from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError

# A step that training drives to zero or below counts as its distance from it, and at least this.
SMALLEST_STEP = 1e-8


def fake_quantize(x: Tensor, step: Tensor, low: Tensor, high: Tensor, step_gradient: float) -> Tensor:
    """`step * round(clamp(x / step, low, high))`; the gradient of the `step` is multiplied by `step_gradient`.

    Step, low and high, of shapes that broadcast to that of `x`, count as they are; a step of zero or below as its
    distance from zero. Computed in float32 at least and returned in the type of `x`.
    """
    quantized: Tensor = _FakeQuantize.apply(x, positive(step), low, high, step_gradient)
    return quantized


def check_finite(name: str, weight: Tensor, step: Tensor) -> None:
    """Raises UserError, which names the layer `name`, for weights or a step that training has led astray."""
    if not (torch.isfinite(weight).all() and torch.isfinite(step).all()):
        raise UserError(f"{name}: found weights or steps that are not finite; training has diverged")


def positive(step: Tensor) -> Tensor:
    return step.abs().clamp_min(SMALLEST_STEP)


class _FakeQuantize(torch.autograd.Function):
    """`step * round(clamp(x / step, low, high))`, computed in float32 at least and returned in the type of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: Tensor, high: Tensor, step_gradient: float) -> Tensor:
        scaled = x.to(torch.promote_types(x.dtype, torch.float32)) / step
        ctx.save_for_backward(scaled, step, low, high)
        ctx.step_gradient = step_gradient
        return (scaled.clamp(low, high).round() * step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled, step, low, high = ctx.saved_tensors
        inside = (scaled >= low) & (scaled <= high)
        of_step = torch.where(inside, scaled.round() - scaled, scaled.clamp(low, high)) * gradient
        return gradient * inside, of_step.sum_to_size(step.shape).to(step.dtype) * ctx.step_gradient, None, None, None
