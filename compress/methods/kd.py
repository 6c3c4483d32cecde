"""Distillation from a frozen teacher's logits, with whichever loss compares them (`loss=kd`, `loss=dkd`)."""

from typing import Any

from torch import Tensor

from compress.methods.classifier import Classifier
from compress.methods.frozen_teacher import FrozenTeacher


class KD(Classifier):
    """`method=kd` and `method=dkd`: teacher and student see the same augmented images."""

    def __init__(self, teacher: FrozenTeacher, **classifier: Any) -> None:
        super().__init__(**classifier)
        self.teacher = teacher

    def on_fit_start(self) -> None:
        self.teacher.to(self.device)

    def losses(self, images: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        teacher_logits = self.teacher(images)
        logits = self.model(images)
        return logits, self.loss(logits, target, teacher_logits, self.current_epoch)
