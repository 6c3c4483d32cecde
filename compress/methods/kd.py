"""Distillation from a frozen teacher's logits, with whichever loss compares them (`loss=kd`, `loss=dkd`)."""

from typing import Any

from torch import Tensor

from compress.methods.classifier import Classifier
from compress.methods.frozen_teacher import FrozenTeacher
from compress.methods.mixup import Blend


class KD(Classifier):
    """`method=kd` and `method=dkd`: teacher and student see the same augmented images."""

    def __init__(self, teacher: FrozenTeacher, **classifier: Any) -> None:
        super().__init__(**classifier)
        self.teacher = teacher

    def on_fit_start(self) -> None:
        self.teacher.to(self.device)

    def losses(self, images: Tensor, target: Tensor, blend: Blend | None) -> tuple[Tensor, dict[str, Tensor]]:
        seen = blend(images) if blend else images
        if blend and self.mixup.teacher_sees == "clean":
            teacher_logits = blend(self.teacher(images))
        else:
            teacher_logits = self.teacher(seen)
        logits = self.model(seen)
        return logits, self.compared(logits, target, teacher_logits, blend)
