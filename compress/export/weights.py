"""Loads weights from the files people bring: our checkpoints, plain state dicts, published teachers; never code."""

import copy
import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.errors import UserError
from compress.export import container
from compress.models import masks
from compress.models.catalogue import build
from compress.models.channels import with_channels
from compress.models.timm_model import TimmModel

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
ACCEPTED = f"accepted: a state dict in a .safetensors, {', '.join(TORCH_SUFFIXES[:-1])} or {TORCH_SUFFIXES[-1]} file"
# Under which a file keeps its state dict: Lightning and most scripts, mdistiller and RepDistiller, PyTorch's tutorial.
CONTAINERS = ("state_dict", "model", "model_state_dict")
# What wrappers put before the name of a parameter: LightningModules, DataParallel, torch.compile.
WRAPPERS = ("model", "module", "student", "network", "_orig_mod")
COUNTER = "num_batches_tracked"
# Under which a checkpoint of ours says which of its networks is its best, and, by network, which layers of it have
# fewer channels than their architecture.
BEST_NETWORK = "best_network"
CHANNELS = "channels"
NAMED = 3  # keys that a message lists before it only counts


def load_weights(model: nn.Module, path: str | Path, where: str = "checkpoint") -> None:
    """Copies the weights in the file `path` into `model`, cast to the dtypes of the model.

    A plain state dict, or one under "state_dict", "model" or "model_state_dict"; its keys bare or behind `model.`,
    `module.`, `student.`, `network.` or `_orig_mod.`, also several of them. A file may hold several networks under
    different prefixes: the one whose keys are exactly the model's is taken. BatchNorm's `num_batches_tracked` may be
    absent. A `TimmModel` takes timm's own files, too. A pruned network is loaded as it is: `model` gets its masks, or
    fewer channels. Of a checkpoint of ours it is the best network, and of one that was trained on grids the weights
    before they are rounded.

    Raises UserError, which names the key `where` and the file, if the file is missing, unreadable, holds code, or does
    not fit; the model is then as it was.
    """
    if isinstance(model, TimmModel):
        model = model.network
    path = Path(path).expanduser()
    content = _read(path, where)
    weights = _state_dict(content, path, where)
    about = _about(content, path)
    fitting = with_channels(copy.deepcopy(model), about["channels"]) if about["channels"] else model
    expected = fitting.state_dict()
    weights = _without_prefix(weights, expected)
    own = {name: weights.pop(name) for name in [*weights] if masks.is_mask(name)}
    # The model may have other masks from a file before.
    expected = {name: value for name, value in expected.items() if not masks.is_mask(name)}
    _check_keys(weights, expected, path, where)
    _check_tensors(weights, expected, _classifier(fitting), path, where)
    with_channels(model, about["channels"])
    model.load_state_dict(weights, strict=False)  # strict about all but the counters, which were allowed above
    masks.restore(model, own, where)
    masks.mask_zeros(model, [name for name in about["masked"] if name in masks.layers(model)])


def build_network(node: Mapping[str, Any], num_classes: int, where: str = "student") -> nn.Module:
    """The network of a config `node`, with the weights in its `checkpoint` if it names one; `where` is for errors."""
    options = {name: value for name, value in node.items() if name != "checkpoint"}
    network = build(num_classes=num_classes, **options)
    if node.get("checkpoint") is not None:
        load_weights(network, node["checkpoint"], where=f"{where}.checkpoint")
    return network


def _about(content: Any, path: Path) -> dict[str, Any]:
    """What a file of ours says of pruning: the channels of shrunken layers, and the layers whose zeros are masked."""
    if path.suffix != ".safetensors":
        by_network = content.get(CHANNELS) if isinstance(content, Mapping) else None
        found = by_network.get(content.get(BEST_NETWORK, "model")) if isinstance(by_network, Mapping) else None
        return {"channels": found if isinstance(found, Mapping) else {}, "masked": []}
    with safe_open(path, framework="pt", device="cpu") as file:
        text = (file.metadata() or {}).get("description", "{}")
    try:
        described = json.loads(text)
        return {
            "channels": described.get("architecture", {}).get("channels", {}),
            "masked": described.get("masked", []),
        }
    except (ValueError, AttributeError):
        return {"channels": {}, "masked": []}


def _read(path: Path, where: str) -> Any:
    if not path.exists():
        raise UserError(f"{where}: found no file at {path}; {ACCEPTED}")
    if not path.is_file():
        raise UserError(f"{where}: found a folder at {path}; {ACCEPTED}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, where)
    if path.suffix not in TORCH_SUFFIXES:
        raise UserError(f"{where}: found {path}; {ACCEPTED}")
    try:
        with path.open("rb") as file:
            mappable = file.read(4) == b"PK\x03\x04"  # files from before torch 1.6 are no zip archives
    except OSError as error:
        raise UserError(f"{where}: found {path}, which cannot be read ({error.strerror}); {ACCEPTED}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a file looks like that is then refused, or loaded
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # a damaged file can fail anywhere in the decoder, with any exception
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise UserError(
                f"{where}: found Python objects beside the tensors in {path}, which could run code; {ACCEPTED}"
            ) from None
        raise UserError(f"{where}: found {path}, which is damaged or no checkpoint; {ACCEPTED}") from None


def _read_safetensors(path: Path, where: str) -> dict[str, Tensor]:
    try:
        kind, _, tensors = container.read(path)
    except container.NoDescriptionError:
        return load_file(path)
    except UserError:
        raise UserError(f"{where}: found {path}, which is damaged or no safetensors file; {ACCEPTED}") from None
    if kind.startswith("compress-packed"):
        raise UserError(f"{where}: found {path}, which is a packed model and no checkpoint; {ACCEPTED}")
    return tensors


def _state_dict(content: Any, path: Path, where: str) -> dict[str, Tensor]:
    """The tensors by name, out of whatever they are wrapped in."""
    found = content
    for _ in range(2):  # {"model": {"state_dict": ...}} is the deepest nesting met; a loop could run in a circle
        if isinstance(found, Mapping):
            found = next((found[name] for name in CONTAINERS if isinstance(found.get(name), Mapping)), found)
    tensors = {}
    if isinstance(found, Mapping):
        tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        kind = f"the keys {_listed(content)}" if isinstance(content, Mapping) and content else type(content).__name__
        raise UserError(f"{where}: found {kind} and no tensors in {path}; {ACCEPTED}")
    best = content.get(BEST_NETWORK) if isinstance(content, Mapping) else None
    if isinstance(best, str):
        prefix = f"{best}."
        own = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
        tensors = _without_grids(own)
    return tensors


def _without_grids(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of the float network; those of a network with fake quantizers name the weights behind them."""
    plain = {name.replace(".parametrizations.weight.original", ".weight"): each for name, each in tensors.items()}
    return {
        name: each
        for name, each in plain.items()
        if ".parametrizations." not in name and ".input_quantizer." not in name
    }


def _without_prefix(weights: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries behind the prefix that fits best, by their bare names: all names if one does, then most shapes."""
    prefixes = {""}
    for name in weights:
        prefix = ""
        for part in name.split(".")[:-1]:
            if part not in WRAPPERS:
                break
            prefix += f"{part}."
            prefixes.add(prefix)
    views = [
        {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        for prefix in sorted(prefixes, key=lambda prefix: (len(prefix), prefix))
    ]

    def fit(view: dict[str, Tensor]) -> tuple[bool, int]:
        fitting = [name for name in view if name in expected and view[name].shape == expected[name].shape]
        return _countless(view) == _countless(expected), len(fitting)

    return max(views, key=fit)


def _check_keys(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, where: str) -> None:
    missing = [name for name in expected if name not in weights and not name.endswith(COUNTER)]
    unexpected = [name for name in weights if name not in expected]
    problems = [f"lacks {_listed(missing)}"] if missing else []
    problems += [f"has the unknown {_listed(unexpected)}"] if unexpected else []
    if problems:
        wanted = len(_countless(expected))
        raise UserError(f"{where}: {path} {' and '.join(problems)}; accepted: exactly the model's {wanted} keys")


def _check_tensors(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], classifier: str, path: Path, where: str
) -> None:
    wrong = [name for name in weights if weights[name].shape != expected[name].shape]
    weight = f"{classifier}.weight"
    if weight in wrong and set(wrong) <= {weight, f"{classifier}.bias"}:
        found, wanted = weights[weight].shape, expected[weight].shape
        if found[1:] == wanted[1:]:
            raise UserError(f"{where}: {path} has {found[0]} classes, the data have {wanted[0]}")
    if wrong:
        shown = [f"{name} {tuple(weights[name].shape)} for {tuple(expected[name].shape)}" for name in wrong]
        raise UserError(f"{where}: found other shapes in {path}: {_listed(shown)}; accepted: the model's own")
    kinds = [name for name in weights if weights[name].is_floating_point() != expected[name].is_floating_point()]
    if kinds:
        shown = [f"{name} {str(weights[name].dtype).removeprefix('torch.')}" for name in kinds]
        raise UserError(f"{where}: found {_listed(shown)} in {path}; accepted: floating-point weights")
    empty = [name for name in weights if weights[name].is_meta]
    if empty:
        raise UserError(f"{where}: found {_listed(empty)} without values in {path}; {ACCEPTED}")
    broken = [name for name in weights if not weights[name].isfinite().all()]
    if broken:
        raise UserError(
            f"{where}: found values that are no numbers in {path}: {_listed(broken)}; accepted: finite ones"
        )


def _classifier(model: nn.Module) -> str:
    """The name of the last Linear."""
    return next((name for name, module in reversed([*model.named_modules()]) if isinstance(module, nn.Linear)), "")


def _countless(names: Mapping[str, Tensor]) -> set[str]:
    return {name for name in names if not name.endswith(COUNTER) and not masks.is_mask(name)}


def _listed(items: Any) -> str:
    items = [str(item) for item in items]
    more = len(items) - NAMED
    return ", ".join(items[:NAMED]) + (f" and {more} more" if more > 0 else "")
