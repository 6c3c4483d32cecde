"""RandAugment on batches: images that drew the same operation are transformed together.

Cubuk et al. 2019, https://arxiv.org/abs/1909.13719; operations, ranges and fill are those of torchvision's RandAugment.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from compress.data.transfer import moved

GREATEST_MAGNITUDE = 30


def _shear(images: Tensor, strength: float, along_x: bool) -> Tensor:
    degrees = math.degrees(math.atan(0.3 * strength))
    shear = [degrees, 0.0] if along_x else [0.0, degrees]
    sheared: Tensor = F.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0.0, 0.0])
    return sheared


def _translate(images: Tensor, strength: float, along_x: bool) -> Tensor:
    # 150 of 331 pixels is the range of the paper's ImageNet policy, as a share of the side.
    pixels = int(150 / 331 * images.shape[-1 if along_x else -2] * strength)
    translate = [pixels, 0] if along_x else [0, pixels]
    translated: Tensor = F.affine(images, angle=0.0, translate=translate, scale=1.0, shear=[0.0, 0.0])
    return translated


def _enhance(images: Tensor, strength: float, adjust: Callable[[Tensor, float], Tensor]) -> Tensor:
    return adjust(images, 1 + 0.9 * strength)


# Name: (operation on uint8 (B, 3, H, W) and a strength in -1..1, whether the sign of the strength is drawn).
OPERATIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], bool]] = {
    "identity": (lambda images, _: images, False),
    "shear_x": (partial(_shear, along_x=True), True),
    "shear_y": (partial(_shear, along_x=False), True),
    "translate_x": (partial(_translate, along_x=True), True),
    "translate_y": (partial(_translate, along_x=False), True),
    "rotate": (lambda images, strength: F.rotate(images, 30.0 * strength), True),
    "brightness": (partial(_enhance, adjust=F.adjust_brightness), True),
    "saturation": (partial(_enhance, adjust=F.adjust_saturation), True),
    "contrast": (partial(_enhance, adjust=F.adjust_contrast), True),
    "sharpness": (partial(_enhance, adjust=F.adjust_sharpness), True),
    "posterize": (lambda images, strength: F.posterize(images, 8 - round(4 * strength)), False),
    "solarize": (lambda images, strength: F.solarize(images, 255 * (1 - strength)), False),
    "autocontrast": (lambda images, _: F.autocontrast(images), False),
    "equalize": (lambda images, _: F.equalize(images), False),
}


def rand_augment(images: Tensor, operations: Tensor, negative: Tensor, magnitude: int) -> Tensor:
    """Applies to image b of uint8 `(B, 3, H, W)` the operations `operations[b]`, one after the other.

    `operations`: int64 `(B, k)`, indices into OPERATIONS; `negative`: bool `(B, k)`, whether a signed strength is
    negated; `magnitude`: 0..30 for strengths 0..1. Both tables lie on the CPU, where the groups are formed.
    """
    table = list(OPERATIONS.values())
    signed = torch.tensor([is_signed for _, is_signed in table])
    for operation, minus in zip(operations.unbind(1), negative.unbind(1), strict=True):
        group = 2 * operation + (minus & signed[operation])
        result = torch.empty_like(images)
        for key in group.unique().tolist():
            members = moved((group == key).nonzero()[:, 0], images.device)
            strength = magnitude / GREATEST_MAGNITUDE * (-1 if key % 2 else 1)
            result[members] = table[key // 2][0](images[members], strength)
        images = result
    return images
