"""Weights of timm's models: those that timm lists, and those on the hub under a description that timm reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.errors import UserError
from compress.models.published import FAILURES, File, Published, downloads, unique
from compress.models.timm_model import create, description, known_name

HUB = "hf-hub:"
IMAGENET = 1000  # classes
# What the weights of a model on the hub are called there.
FILE = "model.safetensors"


@dataclass(frozen=True)
class TimmWeights(Published):
    """`about` is timm's description of them."""

    about: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self, input_size: int | None) -> dict[str, Tensor]:
        name, classes, path = self.options["name"], self.about["num_classes"], self.file.fetched()
        # Archives of NumPy are read by code of the model's.
        about = {**self.about, "file": str(path), "source": None, "custom_load": path.suffix == ".npz"}
        try:
            return create(name, classes, input_size, pretrained=True, pretrained_cfg=about).state_dict()
        except FAILURES as failure:
            raise self.file.unreadable(failure) from failure


def published(name: str, weights: bool | str) -> TimmWeights:
    """The weights called `weights`, a tag of timm or `hf-hub:OWNER/NAME`; true: those that `name` says, or timm.

    The description of weights on the hub is fetched, where it is not on this machine.

    Raises UserError for a name without such weights.
    """
    source = name if weights is True else str(weights)
    if source.startswith(HUB):
        return _on_hub(source)
    architecture, _, tag = name.partition(".")
    return _of_timm(architecture, tag if weights is True else source)


def _of_timm(architecture: str, tag: str) -> TimmWeights:
    """Those of timm's own list; without a `tag` those that timm takes."""
    _check_name(architecture)
    import timm

    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{architecture}.*")]
    if not tags:
        raise UserError(f"found {architecture}, of which timm has no weights; accepted: false")
    if tag and tag not in tags:
        raise UserError(f"found {tag!r}, which are no weights of {architecture}; accepted: {', '.join(tags)}")
    usual = description(architecture).tag
    tag = tag or (usual if usual in tags else tags[0])
    about = description(f"{architecture}.{tag}").to_dict()
    identity = about.get("hf_hub_id")
    address = _address(identity, about.get("hf_hub_filename") or FILE) if identity else about["url"]
    name = f"{architecture}.{tag}{Path(address).suffix}" if identity else address.rpartition("/")[2]
    return _described({"name": architecture}, tag, about, File(address, downloads() / name, identity))


def _on_hub(source: str) -> TimmWeights:
    """Those that `hf-hub:OWNER/NAME` holds beside a description, its config.json."""
    try:
        from timm.models._hub import load_model_config_from_path
    except ImportError:
        raise UserError(f"found {source!r}, which timm reads; accepted after: pip install 'compress[timm]'") from None

    identity = source.removeprefix(HUB)
    if identity.count("/") != 1:
        raise UserError(f"found {source!r}; accepted: {HUB}OWNER/NAME")
    folder = downloads() / identity.replace("/", "--")
    config = File(_address(identity, "config.json"), folder / "config.json", identity)
    weights = File(_address(identity, FILE), folder / FILE, identity)
    try:
        about, architecture, arguments = load_model_config_from_path(config.fetched().parent)
        _check_name(architecture)
        size = arguments.pop("img_size", None)
        options = {"name": architecture} | ({"input_size": size} if size else {})
        described = _described(options, source, about, weights)
    except (KeyError, TypeError, ValueError, AttributeError) as failure:
        raise config.unreadable(failure) from failure
    other = {key: value for key, value in arguments.items() if key != "num_classes" and (key, value) != ("in_chans", 3)}
    if other:
        raise UserError(f"found {source!r}, {architecture} with {other}; accepted: timm's {architecture} as it is")
    return described


def _described(options: Mapping[str, Any], weights: str, about: Mapping[str, Any], file: File) -> TimmWeights:
    return TimmWeights(
        options=options,
        weights=weights,
        size=options.get("input_size") or about["input_size"][-1],
        fixed=bool(about.get("fixed_input_size")),
        mean=tuple(about["mean"]),
        standard_deviation=tuple(about["std"]),
        class_names=unique(_label_names(about)),
        licence=about.get("license"),
        about=about,
        file=file,
    )


def _label_names(about: Mapping[str, Any]) -> Sequence[str]:
    """Those of the description, or ImageNet's where there are as many classes."""
    from timm.data.imagenet_info import ImageNetInfo

    given: Sequence[str] | None = about.get("label_names")
    if given:
        return given
    return list(ImageNetInfo().label_descriptions()) if about["num_classes"] == IMAGENET else ()


def _address(identity: str, name: str) -> str:
    return f"https://huggingface.co/{identity}/resolve/main/{name}"


def _check_name(architecture: str) -> None:
    try:
        known_name(architecture)
    except ValueError as mistake:
        raise UserError(f"found {architecture!r}; accepted: {mistake}") from None
