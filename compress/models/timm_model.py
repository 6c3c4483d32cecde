"""The classifiers of timm by name, on images of any size; timm is the optional extra of that name."""

import contextlib
import copy
import difflib
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import nn

from compress.errors import UserError, first_line
from compress.models.resized import Resized

NEAR = 4  # names that a message suggests
EXAMPLES = ("resnet10t", "vit_tiny_patch16_224")


def known_name(name: str) -> str:
    """Only what lies in timm itself: its builder would also fetch an `hf-hub:` name from the network."""
    try:
        import timm
    except ImportError:
        raise ValueError("a name of timm, which is not installed: pip install 'compress[timm]'") from None
    names = timm.list_models()
    if name not in names:
        architecture, dot, _ = name.partition(".")
        near = [architecture] if architecture in names else difflib.get_close_matches(architecture, names, NEAR, 0.4)
        of_weights = dot or name.startswith("hf-hub:")
        hint = "; with pretrained=true, such with a tag or hf-hub:OWNER/NAME" if of_weights else ""
        raise ValueError(f"a name of timm without a tag, such as {', '.join(near or EXAMPLES)}{hint}")
    return name


class TimmModel(Resized):
    """`(B, 3, H, W) -> (B, num_classes)`, logits of the timm model `name` with fresh weights; nothing is downloaded.

    Raises UserError where timm cannot make the model for `input_size`.
    """

    def __init__(
        self,
        num_classes: Annotated[int, Field(ge=1)],
        name: Annotated[str, AfterValidator(known_name)],
        input_size: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        about = description(name)
        usual = about.input_size[-1]
        try:
            network = create(name, num_classes, input_size)
            if input_size not in (None, usual):
                _try(network, input_size)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            reason = first_line(error)
            raise UserError(
                f"input_size: found {input_size}, for which timm has no {name} ({reason}); accepted: such as {usual}"
            ) from error
        super().__init__(network, input_size or (usual if about.fixed_input_size else None))


def create(name: str, num_classes: int, input_size: int | None, **options: Any) -> nn.Module:
    """timm's model `name`, made for images of `input_size` pixels where it is made for one size."""
    import timm

    if input_size and description(name).fixed_input_size:
        options["img_size"] = input_size
    return timm.create_model(name, num_classes=num_classes, **options)


def description(name: str) -> Any:
    """timm's `PretrainedCfg` of a model and weights that it has."""
    import timm

    return timm.get_pretrained_cfg(name)


def _try(network: nn.Module, size: int) -> None:
    """Sends the shape of an image through `network`, which computes nothing."""
    with torch.no_grad(), contextlib.suppress(NotImplementedError):  # some operations need values
        copy.deepcopy(network).eval().to("meta")(torch.empty(1, 3, size, size, device="meta"))
