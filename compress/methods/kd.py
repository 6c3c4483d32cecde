"""Distillation from a teacher's logits, with whichever loss compares them (`loss=kd`, `loss=dkd`)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from compress.methods.cached_teacher import Views
from compress.methods.classifier import Classifier, Teacher
from compress.methods.learning_teacher import LearningTeacher
from compress.methods.mixup import Blend


class KD(Classifier):
    """`method=kd` and `method=dkd`: teacher and student see the same augmented images.

    With `update_teacher` the teacher learns too, from the labels and the student: it minimises the same loss with the
    roles exchanged, logged as `train/teacher_loss`. It is then a part of this module, but the student alone is
    quantized and written. teacher_cache: how many views of each image are replayed, so that the logits of a frozen
    teacher are computed once for each, see `compress.methods.cached_teacher`; auto: one where images are not augmented
    at random, else the logits are computed in every step, as with None.
    """

    needs = frozenset({"teacher"})
    loss_compares_with = frozenset({"teacher"})
    teacher: Teacher

    def __init__(self, update_teacher: bool = False, teacher_cache: Views = "auto", **supplied: Any) -> None:
        super().__init__(**supplied)
        if update_teacher != isinstance(self.teacher, LearningTeacher):
            raise ValueError(f"a {type(self.teacher).__name__} was given for update_teacher={update_teacher}")
        self.update_teacher = update_teacher
        if update_teacher:
            self.teacher_accuracy = MulticlassAccuracy(self.num_classes, average="micro")

    @classmethod
    def updates_teacher(cls, options: Mapping[str, Any]) -> bool:
        return bool(options.get("update_teacher", False))

    def losses(self, images: Tensor, target: Tensor, blend: Blend | None) -> tuple[Tensor, dict[str, Tensor]]:
        seen = blend(images) if blend else images
        teacher_logits = self.teacher_logits(images, seen, blend)
        logits = self.model(seen)
        terms = self.loss_terms(logits, target, teacher_logits.detach(), blend)
        if teacher_logits.requires_grad:
            teacher_terms = self.loss_terms(teacher_logits, target, logits.detach(), blend)
            terms["teacher_loss"] = torch.stack(list(teacher_terms.values())).sum()
        return logits, terms

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        super().validation_step(batch, batch_index)
        if self.update_teacher:
            images, target = batch
            self.teacher_accuracy.update(self.teacher(images), target)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.update_teacher:
            self.log("val/accuracy_of_teacher", self.teacher_accuracy)

    def configure_optimizers(self) -> Any:
        # No gradient crosses between the two, so one optimizer moves them as two optimizers would;
        # `trainer.gradient_clip_val` bounds the norm of both together.
        if isinstance(self.teacher, LearningTeacher):
            return self.optimized(nn.ModuleList([self.model, self.teacher]))
        return self.optimized(self.model)
