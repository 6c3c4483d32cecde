"""Weights that are published under a name: what they were trained on, and their tensors, fetched where needed."""

import pickle
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.hub import download_url_to_file

from compress.errors import UserError, first_line
from compress.files import write_atomically

# What reading a file of weights can end with that is damaged or something else.
FAILURES = (OSError, RuntimeError, TypeError, ValueError, KeyError, pickle.UnpicklingError)


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """`names`, of which some stand for several classes, as ImageNet's `crane`, each with a number behind the first."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(found)


def downloads() -> Path:
    """The folder in which PyTorch keeps the weights that it has downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints"


@dataclass(frozen=True)
class File:
    """A published file: that at its `address` is wanted at `place`, or in the cache of the hub if `identity` is there.

    A `digest` is the beginning of its SHA-256, in hexadecimal digits.
    """

    address: str
    place: Path
    identity: str | None = None  # OWNER/NAME on the hub
    digest: str | None = None

    def fetched(self) -> Path:
        """Where it is. Raises UserError for one that is not on this machine and cannot be fetched."""
        if self.place.exists():
            return self.place
        try:
            if self.identity is not None:
                return self._from_hub(self.identity)
            self.place.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(self.address, str(self.place), self.digest)
        except (OSError, RuntimeError) as failure:
            raise UserError(
                f"found weights that are not on this machine and cannot be fetched ({first_line(failure)}); accepted: "
                f"a connection, or {self.address} as {self.place}"
            ) from failure
        return self.place

    def unreadable(self, failure: BaseException) -> UserError:
        """What is said of a file that was found and cannot be read."""
        why = first_line(failure)
        return UserError(f"found {self.fetched()}, which cannot be read ({why}); accepted: {self.address}")

    def _from_hub(self, identity: str) -> Path:
        from huggingface_hub import hf_hub_download

        with _quiet():
            return Path(hf_hub_download(identity, self.address.rpartition("/")[2]))


@dataclass(frozen=True)
class Published(ABC):
    """Weights of an architecture, which images they want, and which classes they tell apart.

    `options` are those of the network, `weights` is the name of the weights among those published of it. Images have
    `size` pixels on each side, and no others where it is `fixed`, and are normalised by `mean` and
    `standard_deviation`, of pixel values in 0..1. Without a `licence` it is not known.
    """

    options: Mapping[str, Any]
    weights: str
    size: int
    fixed: bool
    mean: tuple[float, ...]
    standard_deviation: tuple[float, ...]
    file: File
    class_names: Sequence[str] = ()
    licence: str | None = None

    def checkpoint(self, input_size: int | None) -> Path:
        """A file of weights of the network, made for images of `input_size` pixels, with the classes of its own.

        It is written beside the published one, under the names and in the shapes of the network, and used again.

        Raises UserError where a file is missing and cannot be fetched, or is damaged.
        """
        path = self.file.fetched()
        weights = self.weights.replace("/", "--").replace(":", "--")
        size = f".{input_size}" if input_size else ""
        converted = downloads() / f"{self.options['name']}.{weights}{size}.converted.pt"
        if not converted.exists() or converted.stat().st_mtime < path.stat().st_mtime:
            # Which has a checksum of every tensor. Copies, for a tensor may be a part of a larger one.
            tensors = {name: tensor.clone() for name, tensor in self.tensors(input_size).items()}
            write_atomically(converted, lambda temporary: torch.save(tensors, temporary))
        return converted

    @abstractmethod
    def tensors(self, input_size: int | None) -> dict[str, Tensor]:
        """The state dict of that network. Raises the same errors."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it, the hub's library says nothing of what it tries again."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # has no annotations
    try:
        yield
    finally:
        logging.set_verbosity(before)
