"""Relational knowledge distillation: the student keeps distances and angles between images (Park et al. 2019)."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.errors import UserError
from compress.losses.relational import angle_loss, distance_loss
from compress.methods.classifier import Shape
from compress.methods.feature_distillation import FeatureDistillation, Pairs
from compress.models.channels import last_linear

Weight = Annotated[float, Field(ge=0)]


class RKD(FeatureDistillation):
    """`method=rkd`: the loss, `distance_weight` times the distance loss and `angle_weight` times the angle loss.

    By default both are taken of what goes into the classifiers, elsewhere of what goes into the modules in `layers`;
    feature maps are averaged over their pixels.
    """

    inputs = True

    def __init__(self, distance_weight: Weight = 25.0, angle_weight: Weight = 50.0, **options: Any) -> None:
        super().__init__(**options)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    @classmethod
    def default_pairs(cls, student: nn.Module, teacher: nn.Module, input_shape: Shape) -> Pairs:
        layer, teacher_layer = last_linear(student), last_linear(teacher)
        if layer is None or teacher_layer is None:
            raise UserError("method.layers: found a network without a linear layer; accepted: names of modules")
        return [(layer, teacher_layer)]

    @classmethod
    def check_shape(cls, key: str, name: str, shape: tuple[int, ...] | None) -> None:
        if shape is None or len(shape) not in (2, 4):
            raise UserError(f"{key}: found {name!r}, which takes no features; accepted: a convolution or linear layer")

    def feature_terms(self, student: list[Tensor], teacher: list[Tensor]) -> dict[str, Tensor]:
        pairs = [(_flat(one), _flat(other)) for one, other in zip(student, teacher, strict=True)]
        return {
            "distance": self.distance_weight * torch.stack([distance_loss(*pair) for pair in pairs]).sum(),
            "angle": self.angle_weight * torch.stack([angle_loss(*pair) for pair in pairs]).sum(),
        }


def _flat(features: Tensor) -> Tensor:
    return features.mean(dim=(2, 3)) if features.dim() == 4 else features
