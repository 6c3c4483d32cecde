"""Attention transfer: the student looks where the teacher looks (Zagoruyko & Komodakis 2017)."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from compress.losses.attention import attention_loss
from compress.methods.feature_distillation import FeatureDistillation


class AT(FeatureDistillation):
    """`method=at`: the loss, and `beta` times the sum of the attention losses of all pairs."""

    def __init__(self, beta: Annotated[float, Field(gt=0)] = 1000.0, **options: Any) -> None:
        super().__init__(**options)
        self.beta = beta

    def feature_terms(self, student: list[Tensor], teacher: list[Tensor]) -> dict[str, Tensor]:
        distances = [attention_loss(one, other) for one, other in zip(student, teacher, strict=True)]
        return {"attention": self.beta * torch.stack(distances).sum()}
