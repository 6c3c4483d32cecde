"""Teachers that cannot learn: in eval mode, without gradients, and no part of the module that uses them."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.models.inference import frozen_for_inference, low_precision_dtype


class FrozenTeacher:
    """Calls a network as a fixed function `(B, 3, H, W) -> (B, C)`, logits in float32.

    It is not an `nn.Module`, so a LightningModule that holds one has none of its weights in checkpoints, optimizers,
    `train()` switches or DDP. The network is copied, its BatchNorm folded, laid out for speed, and run in
    bfloat16 where the hardware has it. `input_shape` is that of an image, `(C, H, W)`.

    `renormalise = (factor, offset)`, each `(3,)`, turns images normalised for the student into images normalised
    for a teacher trained elsewhere: `images * factor + offset`.
    """

    def __init__(
        self, network: nn.Module, input_shape: Sequence[int], renormalise: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.network = frozen_for_inference(network, input_shape)
        self.renormalise = renormalise
        self.low_precision: torch.dtype | None = None

    def to(self, device: torch.device) -> None:
        """Moves the network and picks the precision that `device` runs fast; until then it computes in float32."""
        self.to_float32(device)
        self.low_precision = low_precision_dtype(device)

    def to_float32(self, device: torch.device) -> None:
        """Moves the network to `device`, where it is to compute in float32."""
        self.network.to(device)
        self.low_precision = None
        if self.renormalise is not None:
            factor, offset = self.renormalise
            self.renormalise = factor.to(device), offset.to(device)

    def digest(self) -> str:
        """The SHA-256, in hexadecimal, of what it computes with but the precision: modules, tensors, normalisation."""
        content = hashlib.sha256(repr(self.network).encode())
        for name, tensor in [*self.network.state_dict().items(), *enumerate(self.renormalise or ())]:
            content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            content.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return content.hexdigest()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        images = images.float()
        if self.renormalise is not None:
            factor, offset = (values.view(1, 3, 1, 1) for values in self.renormalise)
            images = images * factor + offset
        enabled = self.low_precision is not None
        with torch.autocast(images.device.type, dtype=self.low_precision or torch.bfloat16, enabled=enabled):
            logits: Tensor = self.network(images)
            return logits.float()


class FrozenEnsemble:
    """Several teachers called as one, `(B, 3, H, W) -> (B, C)`: the mean of their logits, in float32.

    It stands wherever a `FrozenTeacher` does but where a method looks into the one `network` of that.
    """

    def __init__(self, members: Sequence[FrozenTeacher]) -> None:
        self.members = tuple(members)

    def to(self, device: torch.device) -> None:
        """Moves every member, see `FrozenTeacher.to`."""
        for member in self.members:
            member.to(device)

    def to_float32(self, device: torch.device) -> None:
        """Moves every member, see `FrozenTeacher.to_float32`."""
        for member in self.members:
            member.to_float32(device)

    def digest(self) -> str:
        """See `FrozenTeacher.digest`."""
        return hashlib.sha256("".join(member.digest() for member in self.members).encode()).hexdigest()

    def __call__(self, images: Tensor) -> Tensor:
        return torch.stack([member(images) for member in self.members]).mean(dim=0)
