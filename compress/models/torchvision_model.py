"""The classifiers of torchvision by name, as they are there, on images of any size, and their published weights."""

import difflib
import re
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torchvision
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.hub import HASH_REGEX
from torchvision.models import get_model_builder, get_model_weights, list_models
from torchvision.models.vision_transformer import interpolate_embeddings

from compress.checksums import check_archive
from compress.errors import UserError, first_line
from compress.models.published import FAILURES, File, Published, downloads, unique
from compress.models.resized import Resized

# The sides in pixels that models are made for which take images of one size alone.
FIXED = {"vit": 224, "maxvit": 224}


def _known(name: str) -> str:
    names = list_models(module=torchvision.models)
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, 4, 0.4) or names[:4]
        raise ValueError(f"a classifier of torchvision, such as {', '.join(near)}")
    return name


class TorchvisionModel(Resized):
    """`(B, 3, H, W) -> (B, num_classes)`, logits of torchvision's classifier `name` with fresh weights.

    Raises UserError where torchvision cannot make the model for `input_size`.
    """

    def __init__(
        self,
        num_classes: Annotated[int, Field(ge=1)],
        name: Annotated[str, AfterValidator(_known)],
        input_size: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        try:
            network = _create(name, num_classes, input_size)
        except (AssertionError, ValueError) as mistake:
            raise UserError(
                f"input_size: found {input_size}, for which torchvision has no {name} ({first_line(mistake)}); "
                "accepted: such as 224"
            ) from mistake
        super().__init__(network, input_size or FIXED.get(name.partition("_")[0]))


@dataclass(frozen=True)
class TorchvisionWeights(Published):
    """Those of one member of the enumeration of weights of a classifier."""

    def tensors(self, input_size: int | None) -> dict[str, Tensor]:
        try:
            check_archive(self.file.fetched())
            state = torch.load(self.file.fetched(), map_location="cpu", weights_only=True)
        except FAILURES as failure:
            raise self.file.unreadable(failure) from failure
        name = self.options["name"]
        if name.startswith("vit_") and input_size:
            state = interpolate_embeddings(input_size, int(name.rpartition("_")[2]), state)
        # DenseNet's files are older than the names of its modules.
        return {re.sub(r"\.(norm|conv)\.([12])\.", r".\1\2.", key): tensor for key, tensor in state.items()}


def published(name: str, weights: bool | str) -> TorchvisionWeights:
    """The weights called `weights`, as `IMAGENET1K_V1` or `ResNet18_Weights.IMAGENET1K_V1`; true: torchvision's choice.

    Raises UserError for a name without such weights.
    """
    try:
        enumeration = get_model_weights(_known(name))
    except ValueError as mistake:
        raise UserError(f"found {name!r}; accepted: {mistake}") from None
    wanted = "DEFAULT" if weights is True else str(weights).removeprefix(f"{enumeration.__name__}.")
    if wanted not in enumeration.__members__:
        accepted = ", ".join(member.name for member in enumeration)
        raise UserError(f"found {weights!r}, which are no weights of {name}; accepted: {accepted}")
    member = enumeration[wanted]
    images, name_of_file = member.transforms(), member.url.rpartition("/")[2]
    return TorchvisionWeights(
        options={"name": name},
        weights=member.name,
        size=images.crop_size[0],
        fixed=name.partition("_")[0] in FIXED,
        mean=tuple(images.mean),
        standard_deviation=tuple(images.std),
        class_names=unique(member.meta["categories"]),
        file=File(member.url, downloads() / name_of_file, digest=HASH_REGEX.search(name_of_file)[1]),  # type: ignore[index]  # all have one
    )


def _create(name: str, num_classes: int, input_size: int | None) -> nn.Module:
    options: dict[str, Any] = {"num_classes": num_classes}
    if name.startswith("vit_") and input_size:
        options["image_size"] = input_size
    if name.startswith("maxvit") and input_size:
        options["input_size"] = (input_size, input_size)
    if name in ("inception_v3", "googlenet"):
        options["init_weights"] = True  # they warn where it is not said
    network: nn.Module = get_model_builder(name)(weights=None, **options)
    return network
