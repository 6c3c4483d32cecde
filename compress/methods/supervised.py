"""Training on the labels alone; also how teachers are trained."""

from torch import Tensor

from compress.methods.classifier import Classifier


class Supervised(Classifier):
    """`method=supervised`."""

    def losses(self, images: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.model(images)
        return logits, self.loss(logits, target, epoch=self.current_epoch)
