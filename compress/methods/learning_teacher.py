"""A teacher that goes on learning while it teaches."""

from torch import Tensor, nn


class LearningTeacher(nn.Module):
    """A network called as `FrozenTeacher` calls it, `(B, 3, H, W) -> (B, C)`, that is trained with its student.

    It is an `nn.Module`: a LightningModule that holds one has its weights in checkpoints, `train()` switches and
    moves. `renormalise = (factor, offset)`, each `(3,)`, is that of `FrozenTeacher`.
    """

    factor: Tensor | None
    offset: Tensor | None

    def __init__(self, network: nn.Module, renormalise: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.network = network
        factor, offset = (None, None) if renormalise is None else (values.view(1, 3, 1, 1) for values in renormalise)
        self.register_buffer("factor", factor, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.factor is not None and self.offset is not None:
            images = images * self.factor + self.offset
        logits: Tensor = self.network(images)
        return logits
