"""Reads tensors, never code, from the files people bring: our checkpoints, plain state dicts, published teachers."""

import pickle
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.errors import UserError
from compress.export import container
from compress.export.packed import PACKED

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
ACCEPTED = f"accepted: a state dict in a .safetensors, {', '.join(TORCH_SUFFIXES[:-1])} or {TORCH_SUFFIXES[-1]} file"
# Under which a file keeps its state dict: Lightning and most scripts, mdistiller and RepDistiller, PyTorch's tutorial.
CONTAINERS = ("state_dict", "model", "model_state_dict")
# Under which a checkpoint of ours says which of its networks is its best, and, by network, which layers of it have
# fewer channels than their architecture.
BEST_NETWORK = "best_network"
CHANNELS = "channels"
NAMED = 3  # keys that a message lists before it only counts


@dataclass(frozen=True)
class StateDict:
    """The `tensors` of a file by name, and what it says of pruning.

    channels: the channels of the layers that have fewer than their architecture; masked: layers whose zeros stay zero.
    """

    tensors: dict[str, Tensor]
    channels: Mapping[str, Any] = field(default_factory=dict)
    masked: Sequence[str] = ()


def read_state_dict(path: Path, where: str) -> StateDict:
    """The state dict in a file, out of whatever it is wrapped in; of a checkpoint of ours that of the best network.

    Raises UserError, which names the key `where` and the file, if the file is missing, unreadable, holds code, or has
    no tensors.
    """
    if not path.exists():
        raise UserError(f"{where}: found no file at {path}; {ACCEPTED}")
    if not path.is_file():
        raise UserError(f"{where}: found a folder at {path}; {ACCEPTED}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, where)
    if path.suffix not in TORCH_SUFFIXES:
        raise UserError(f"{where}: found {path}; {ACCEPTED}")
    content = _read_torch(path, where)
    tensors = _unwrapped(content, path, where)
    about = content if isinstance(content, Mapping) else {}
    best = about.get(BEST_NETWORK)
    if isinstance(best, str):
        prefix = f"{best}."
        tensors = _without_grids({name[len(prefix) :]: tensors[name] for name in tensors if name.startswith(prefix)})
    by_network = about.get(CHANNELS)
    channels = by_network.get(best or "model") if isinstance(by_network, Mapping) else None
    return StateDict(tensors, channels if isinstance(channels, Mapping) else {})


def listed(items: Iterable[Any]) -> str:
    """The first few of `items`, and how many more there are."""
    items = [str(item) for item in items]
    more = len(items) - NAMED
    return ", ".join(items[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _read_safetensors(path: Path, where: str) -> StateDict:
    try:
        kind, description, tensors = container.read(path)
    except container.NoDescriptionError:
        kind, description, tensors = None, {}, load_file(path)
    except UserError:
        raise UserError(f"{where}: found {path}, which is damaged or no safetensors file; {ACCEPTED}") from None
    if kind == PACKED:
        raise UserError(f"{where}: found {path}, which is a packed model and no checkpoint; {ACCEPTED}")
    if not tensors:
        raise UserError(f"{where}: found no tensors in {path}; {ACCEPTED}")
    architecture = description.get("architecture")
    channels = architecture.get("channels", {}) if isinstance(architecture, Mapping) else {}
    return StateDict(tensors, channels, description.get("masked", []))


def _read_torch(path: Path, where: str) -> Any:
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


def _unwrapped(content: Any, path: Path, where: str) -> dict[str, Tensor]:
    """The tensors by name, out of the mappings that hold them."""
    inner = content
    for _ in range(2):  # {"model": {"state_dict": ...}} is the deepest nesting met; a loop could run in a circle
        if isinstance(inner, Mapping):
            inner = next((inner[name] for name in CONTAINERS if isinstance(inner.get(name), Mapping)), inner)
    tensors = {}
    if isinstance(inner, Mapping):
        tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
    if not tensors:
        kind = f"the keys {listed(content)}" if isinstance(content, Mapping) and content else type(content).__name__
        raise UserError(f"{where}: found {kind} and no tensors in {path}; {ACCEPTED}")
    return tensors


def _without_grids(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of the float network; those of a network with fake quantizers name the weights behind them."""
    plain = {name.replace(".parametrizations.weight.original", ".weight"): tensors[name] for name in tensors}
    return {
        name: value
        for name, value in plain.items()
        if ".parametrizations." not in name and ".input_quantizer." not in name
    }
