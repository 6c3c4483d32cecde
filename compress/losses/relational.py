"""Relational knowledge distillation: distances and angles between the images of a batch, not the features themselves.

Park et al. 2019, https://arxiv.org/abs/1904.05068
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.losses.precision import at_least_float32


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the pairwise distances of `(B, D)` and of `(B, E)`, both divided by their mean, a scalar.

    Equations 5 to 7; the mean is over all B^2 pairs, those of an image with itself included. No gradient reaches the
    teacher.
    """
    return F.smooth_l1_loss(_distances(student), _distances(teacher.detach()))


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the cosines of the angles that all triples of `(B, D)` and of `(B, E)` span, a scalar.

    Equations 8 and 9; the mean is over all B^3 triples, so memory grows with them. No gradient reaches the teacher.
    """
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher.detach()))


def _distances(features: Tensor) -> Tensor:
    features = at_least_float32(features)
    squares = (features[:, None] - features[None]).square().sum(dim=2)
    # The root has no gradient at 0, where an image meets itself or its double.
    apart = squares > 0
    distances = torch.where(apart, squares, 1.0).sqrt() * apart
    return distances / (distances.sum() / apart.sum().clamp_min(1)).clamp_min(1e-12)


def _cosines(features: Tensor) -> Tensor:
    """`(B, D) -> (B, B, B)`: element `[j, i, k]` is the cosine at image j between i and k, 0 where one of them is j."""
    features = at_least_float32(features)
    directions = F.normalize(features[None] - features[:, None], dim=2)
    # Autocast would round the operands of the product.
    with torch.autocast(features.device.type, enabled=False):
        return directions @ directions.transpose(1, 2)
