"""FitNet hints: features of the student, through a 1x1 convolution, match those of the teacher.

Romero et al. 2015, https://arxiv.org/abs/1412.6550. The hint is learned together with the task, not in a stage before
it, as in the benchmarks of RepDistiller and mdistiller, whose weight of 100 is the default.
"""

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compress.losses.attention import smaller_size
from compress.losses.precision import at_least_float32
from compress.methods.classifier import Shape
from compress.methods.feature_distillation import FeatureDistillation, Pairs
from compress.methods.features import shapes


class FitNet(FeatureDistillation):
    """`method=fitnet`: the loss, and `beta` times the mean squared differences of all pairs, the middle one by default.

    The convolutions in `regressors` learn with the student, but do not belong to it.
    """

    def __init__(self, beta: Annotated[float, Field(gt=0)] = 100.0, **options: Any) -> None:
        super().__init__(**options)
        self.beta = beta
        names, teacher_names = zip(*self.pairs, strict=True)
        student_shapes = shapes(self.model, names, self.input_shape)
        teacher_shapes = shapes(self.teacher.network, teacher_names, self.input_shape)
        self.regressors = nn.ModuleList(
            nn.Conv2d(student_shape[1], teacher_shape[1], 1, bias=False)
            for student_shape, teacher_shape in zip(student_shapes, teacher_shapes, strict=True)
        )

    @classmethod
    def default_pairs(cls, student: nn.Module, teacher: nn.Module, input_shape: Shape) -> Pairs:
        pairs = super().default_pairs(student, teacher, input_shape)
        return [pairs[len(pairs) // 2]]

    def parameters_to_learn(self, network: nn.Module) -> Iterable[nn.Parameter]:
        return [*network.parameters(), *self.regressors.parameters()]

    def feature_terms(self, student: list[Tensor], teacher: list[Tensor]) -> dict[str, Tensor]:
        distances = []
        for regressor, one, other in zip(self.regressors, student, teacher, strict=True):
            size = smaller_size(one, other)
            fitted = F.adaptive_avg_pool2d(at_least_float32(regressor(one)), size)
            distances.append(F.mse_loss(fitted, F.adaptive_avg_pool2d(at_least_float32(other), size)))
        return {"hint": self.beta * torch.stack(distances).sum()}
