"""Colour jitter on batches: brightness, contrast, saturation and hue change by factors of each image, in its order.

Howard 2013, https://arxiv.org/abs/1312.5402; ranges, operations and rounding are those of torchvision's ColorJitter.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compress.data.draws import Stream, draw, draw_uniform
from compress.data.transfer import moved

LUMA = (0.2989, 0.587, 0.114)  # of red, green and blue


def draw_jitter(count: int, strengths: Sequence[float], seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Factors, float32 `(count, 4)`, and the order of the four operations, int64 `(count, 4)`.

    strengths: s of brightness, contrast and saturation for factors in max(0, 1 - s)..1 + s, and h of hue for a turn in
    -h..h, 1 being the whole circle.
    """
    *factors, hue = strengths
    low = torch.tensor([*(max(0.0, 1 - strength) for strength in factors), -hue], dtype=torch.float64)
    high = torch.tensor([*(1 + strength for strength in factors), hue], dtype=torch.float64)
    share = draw_uniform(count * 4, Stream.JITTER, seed, epoch).view(count, 4)
    order = draw(count * 4, Stream.JITTER_ORDER, seed, epoch).reshape(count, 4).argsort(axis=1, kind="stable")
    return (low + (high - low) * share).float(), torch.from_numpy(order)


def colour_jitter(images: Tensor, factors: Tensor, order: Tensor, strengths: Sequence[float]) -> Tensor:
    """Applies to image b of uint8 `(B, 3, H, W)` the OPERATIONS `order[b]` with `factors[b]`; those of no strength not.

    `factors`, `order`: `(B, 4)` on the CPU. Images whose turn it is for the same operation are changed together.
    """
    for step in order.unbind(1):
        result = images.clone(memory_format=torch.preserve_format)
        for index in step.unique().tolist():
            if strengths[index]:
                members = (step == index).nonzero()[:, 0]
                factor = moved(factors[members, index], images.device).view(-1, 1, 1, 1)
                members = moved(members, images.device)
                result[members] = OPERATIONS[index](images[members], factor)
        images = result
    return images


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0, 255).to(torch.uint8)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _away_from(_grey(images).mean(dim=(1, 2, 3), keepdim=True), images, factor)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _away_from(_grey(images), images, factor)


def _hue(images: Tensor, turn: Tensor) -> Tensor:
    """Through hue h in sixths of the circle, value v and chroma c: a channel is v - c * max(0, min(k, 4 - k, 1))."""
    rgb = images.float() / 255
    value, chroma = rgb.amax(1, keepdim=True), rgb.amax(1, keepdim=True) - rgb.amin(1, keepdim=True)
    red, green, blue = rgb.split(1, dim=1)
    divisor = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    offset = moved(torch.tensor([5.0, 3.0, 1.0]), images.device).view(1, 3, 1, 1)
    k = (offset + hue + 6 * turn).remainder(6)
    turned = value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)
    # As a float in 0..1 becomes a byte in torchvision: each of the 256 has an equal part.
    return (turned.clamp_(0, 1) * 255.999).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Whole levels as float32 `(B, 1, H, W)`."""
    weights = moved(torch.tensor(LUMA), images.device).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True).floor_()


def _away_from(neutral: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    return (neutral + factor * (images - neutral)).clamp_(0, 255).to(torch.uint8)


OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (_brightness, _contrast, _saturation, _hue)
