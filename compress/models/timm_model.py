"""The classifiers of timm by name, on images of any size; timm is the optional extra of that name."""

import contextlib
import copy
import difflib
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from compress.errors import UserError, first_line

NEAR = 4  # names that a message suggests
EXAMPLES = ("resnet10t", "vit_tiny_patch16_224")


def _known(name: str) -> str:
    """Only what lies in timm itself: its builder would also fetch an `hf-hub:` name from the network."""
    try:
        import timm
    except ImportError:
        raise ValueError("a name of timm, which is not installed: pip install 'compress[timm]'") from None
    names = timm.list_models()
    if name not in names:
        near = difflib.get_close_matches(name.partition(".")[0], names, NEAR, 0.4) or EXAMPLES
        raise ValueError(f"a name of timm without a tag, such as {', '.join(near)}")
    return name


class TimmModel(nn.Module):
    """`(B, 3, H, W) -> (B, num_classes)`, logits of the timm model `name` with fresh weights; nothing is downloaded.

    Images are resized to `input_size` pixels, bilinearly. Without it they stay as they are, unless the model is made
    for one size, as ViT is: then they get that. Such a model is made for the `input_size` where there is one.

    The keys are timm's behind `network.`; `compress.export.weights.load_weights` takes them without that prefix, too.

    Raises UserError where timm cannot make the model for `input_size`.
    """

    def __init__(
        self,
        num_classes: Annotated[int, Field(ge=1)],
        name: Annotated[str, AfterValidator(_known)],
        input_size: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        import timm

        super().__init__()
        about = timm.get_pretrained_cfg(name)
        usual = about.input_size[-1]
        options = {"img_size": input_size} if about.fixed_input_size and input_size else {}
        try:
            self.network = timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
            if input_size not in (None, usual):
                _try(self.network, input_size)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            reason = first_line(error)
            raise UserError(
                f"input_size: found {input_size}, for which timm has no {name} ({reason}); accepted: such as {usual}"
            ) from error
        self.input_size = input_size or (usual if about.fixed_input_size else None)

    def forward(self, images: Tensor) -> Tensor:
        if self.input_size is not None:
            size = (self.input_size, self.input_size)
            images = nn.functional.interpolate(images, size, mode="bilinear", antialias=False)
        return self.network(images)


def _try(network: nn.Module, size: int) -> None:
    """Sends the shape of an image through `network`, which computes nothing."""
    with torch.no_grad(), contextlib.suppress(NotImplementedError):  # some operations need values
        copy.deepcopy(network).eval().to("meta")(torch.empty(1, 3, size, size, device="meta"))
