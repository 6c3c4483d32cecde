"""Reads tensors, never code, from the files people bring: our checkpoints, plain state dicts, published teachers."""

import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.checksums import check_archive
from compress.errors import UserError
from compress.export import container
from compress.export.packed import PACKED

ACCEPTED = "accepted: a file of tensors by name, written by torch.save or as safetensors"
# Objects that training scripts keep beside the weights. An inert stand-in takes the place of each, so that reading one
# calls nothing.
HARMLESS = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "argparse.Namespace", "types.SimpleNamespace"),
    *(f"{pathlib}.{system}Path" for pathlib in ("pathlib", "pathlib._local") for system in ("Posix", "Windows")),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
)
# What people have in place of a checkpoint, by how it begins, and what to do.
MISTAKEN = {
    b"version https://git-lfs": ("a pointer of Git LFS", "the file that it stands for, fetched with git lfs pull"),
    b"\x1f\x8b": ("a gzip archive", "the file in it"),
    b"<": ("a web page", "the file, downloaded anew"),
}
DEPTH = 2  # {"model": {"state_dict": ...}} is the deepest nesting met; without a limit it could run in a circle
# Under which a file keeps its state dict: Lightning and most scripts, mdistiller and RepDistiller, PyTorch's tutorial.
CONTAINERS = ("state_dict", "model", "model_state_dict", "net")
# Under which a checkpoint of ours says which of its networks is its best, and, by network, which layers of it have
# fewer channels than their architecture.
BEST_NETWORK = "best_network"
CHANNELS = "channels"
NAMED = 3  # keys that a message lists before it only counts


@dataclass(frozen=True)
class StateDict:
    """The networks in a file, and what it says of pruning.

    networks: the tensors by name of each mapping that has some, by the keys that lead to it, such as `model_ema`, the
    mapping that a user expects first. channels: the channels of the layers that have fewer than their architecture.
    masked: layers whose zeros stay zero. class_names: those of a model file of ours, in order.
    """

    networks: dict[str, dict[str, Tensor]]
    channels: Mapping[str, Any] = field(default_factory=dict)
    masked: Sequence[str] = ()
    class_names: Sequence[str] = ()


def read_state_dict(path: Path, where: str) -> StateDict:
    """The tensors in a file, whatever it is called, out of whatever they are wrapped in.

    Of a checkpoint of ours they are those of the best network. Moving averages come before the weights that they are
    averages of, because they are what training scripts measure and publish.

    Raises UserError, which names the key `where` and the file, if the file is missing, unreadable, holds code, or has
    no tensors.
    """
    if not path.exists():
        raise UserError(f"{where}: found no file at {path}; {ACCEPTED}")
    if not path.is_file():
        raise UserError(f"{where}: found a folder at {path}; {ACCEPTED}")
    try:
        with path.open("rb") as file:
            start = file.read(24)
    except OSError as error:
        raise UserError(f"{where}: found {path}, which cannot be read ({error.strerror}); {ACCEPTED}") from None
    if start[8:9] == b"{":  # the header's length, then the header
        return _read_safetensors(path, where)
    for beginning, (found, wanted) in MISTAKEN.items():
        if start.startswith(beginning):
            raise UserError(f"{where}: found {found} at {path}; accepted: {wanted}")
    content = _read_torch(path, where, mappable=start.startswith(b"PK\x03\x04"))
    about = content if isinstance(content, Mapping) else {}
    best = about.get(BEST_NETWORK)
    if isinstance(best, str):
        tensors = _tensors(about.get("state_dict"))
        prefix = f"{best}."
        own = _without_grids({name[len(prefix) :]: tensors[name] for name in tensors if name.startswith(prefix)})
        networks = {"": own}
    else:
        networks = dict(sorted(_networks(content), key=lambda network: _preference(network[0])))
    if not any(networks.values()):
        kind = f"the keys {listed(content)}" if about else type(content).__name__
        raise UserError(f"{where}: found {kind} and no tensors by name in {path}; {ACCEPTED}")
    by_network = about.get(CHANNELS)
    channels = by_network.get(best or "model") if isinstance(by_network, Mapping) else None
    return StateDict(networks, channels if isinstance(channels, Mapping) else {})


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
    return StateDict({"": tensors}, channels, description.get("masked", []), description.get("class_names", []))


class _LeftOut:
    """Stands for an object of a file, whatever it is made from."""

    def __new__(cls, *_: Any) -> "_LeftOut":
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_torch(path: Path, where: str, mappable: bool) -> Any:
    """What torch.save wrote; files from before torch 1.6, which are no zip archives, cannot be mapped into memory."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_LeftOut, name) for name in HARMLESS]):
            warnings.simplefilter("ignore")  # of what a file looks like that is then refused, or loaded
            check_archive(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # a damaged file can fail anywhere in the decoder, with any exception
        if "TorchScript" in str(error):
            raise UserError(
                f"{where}: found a TorchScript program at {path}; accepted: its tensors, "
                "torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)"
            ) from None
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            named = re.search(r"GLOBAL (\S+)", str(error))
            raise UserError(
                f"{where}: found Python objects{f' ({named[1]})' if named else ''} beside the tensors in {path}, which "
                "could run code; accepted: tensors alone: where the file comes from, "
                "torch.save(model.state_dict(), NEW_FILE)"
            ) from None
        raise UserError(f"{where}: found {path}, which is damaged or no checkpoint; {ACCEPTED}") from None


def _networks(content: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each mapping in `content` that has tensors by name, by the keys that lead to it."""
    if not isinstance(content, Mapping) or depth > DEPTH:
        return
    tensors = _tensors(content)
    if tensors:
        yield key, tensors
    for name, value in content.items():
        yield from _networks(value, f"{key}.{name}".removeprefix("."), depth + 1)


def _tensors(content: Any) -> dict[str, Tensor]:
    named = content.items() if isinstance(content, Mapping) else ()
    return {name: value for name, value in named if isinstance(name, str) and isinstance(value, Tensor)}


def _preference(key: str) -> int:
    """The lower, the more likely it is what the user means by the weights of the file."""
    if re.search(r"(^|[_.])ema($|[_.])", key):
        return 0
    return 1 if {*key.split(".")} & {*CONTAINERS} else 2


def _without_grids(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of the float network; those of a network with fake quantizers name the weights behind them."""
    plain = {name.replace(".parametrizations.weight.original", ".weight"): tensors[name] for name in tensors}
    return {
        name: value
        for name, value in plain.items()
        if ".parametrizations." not in name and ".input_quantizer." not in name
    }
