"""Training on the labels alone; also how teachers are trained."""

from torch import Tensor

from compress.methods.classifier import Classifier
from compress.methods.mixup import Blend


class Supervised(Classifier):
    """`method=supervised`."""

    def losses(self, images: Tensor, target: Tensor, blend: Blend | None) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.model(blend(images) if blend else images)
        return logits, self.loss_terms(logits, target, blend=blend)
