"""Tensors and a description in one safetensors file, the same bytes for the same content, with a checksum over both.

The header is written here and not by the safetensors package, which promises no order for the entries of the metadata.
Format: github.com/huggingface/safetensors, README, "Format".
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.errors import UserError
from compress.export.deflated import LONGEST, deflate, inflate
from compress.files import write_atomically

NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


DESCRIPTION = "description"

# The entry of a description that names, for each tensor that is another one under a second name, that one.
ALIASES = "aliases"


class NoDescriptionError(UserError):
    """A safetensors file of another origin."""


def write(
    path: Path, kind: str, description: Mapping[str, Any], tensors: Mapping[str, Tensor], deflated: bool = False
) -> int:
    """Write `tensors` and a JSON-able `description` under the format name `kind`; returns the size in bytes.

    deflated: keep the description as a tensor of compressed bytes, called DESCRIPTION, instead of in the header. The
    file gets its name only when it is complete. Raises UserError for a description too long to be read again.
    """
    aliases = aliases_of(tensors)
    description = {**description, ALIASES: aliases} if aliases else description
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items() if name not in aliases}
    text = to_json(description)
    metadata = {"format": kind}
    if deflated:
        if len(text) > LONGEST:
            raise UserError(f"{path}: found a description of {len(text):,} characters; accepted: at most {LONGEST:,}")
        tensors[DESCRIPTION] = torch.frombuffer(bytearray(deflate(text)), dtype=torch.uint8)
    else:
        metadata[DESCRIPTION] = text
    # Wide elements first, so that every tensor starts at a multiple of its element's size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    metadata["sha256"] = _checksum(metadata, tensors)
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name in order:
        value = tensors[name]
        end = offset + value.numel() * value.element_size()
        header[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little"))
            file.write(encoded)
            for name in order:
                file.write(_bytes(tensors[name]))

    write_atomically(path, save)
    return path.stat().st_size


def read(path: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """(format name, description, tensors) of a file that `write` made.

    Raises UserError, naming the file, where it is missing, damaged or altered, and NoDescriptionError where it is of
    another origin.
    """
    accepted = "accepted: a model file that compress wrote"
    if not path.is_file():
        raise UserError(f"{path}: found {'a folder' if path.is_dir() else 'no such file'}; {accepted}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the handle is no mapping
    except (SafetensorError, OSError, ValueError, RuntimeError):
        raise UserError(f"{path}: found a truncated file or none of the safetensors format; {accepted}") from None
    if not {"format", "sha256"} <= metadata.keys() or DESCRIPTION not in metadata | tensors:
        raise NoDescriptionError(f"{path}: found a safetensors file without a description of its model; {accepted}")
    if _checksum(metadata, tensors) != metadata["sha256"]:
        raise UserError(
            f"{path}: found content that does not match its checksum, so it was cut short or altered; {accepted}"
        )
    try:
        text = metadata[DESCRIPTION] if DESCRIPTION in metadata else inflate(bytes(_bytes(tensors.pop(DESCRIPTION))))
        description = json.loads(text)
    except (ValueError, RecursionError):
        description = None
    if not isinstance(description, dict):
        raise UserError(f"{path}: found a description that is not a JSON object; {accepted}")
    aliases = description.pop(ALIASES, {})
    if not isinstance(aliases, dict) or any(
        name in tensors or not isinstance(one, str) or one not in tensors for name, one in aliases.items()
    ):
        raise UserError(f"{path}: found {ALIASES} that its tensors do not fit; {accepted}")
    return metadata["format"], description, tensors | {name: tensors[one] for name, one in aliases.items()}


def to_json(content: Any) -> str:
    """One line of JSON, the same for the same content."""
    return json.dumps(content, separators=(",", ":"), sort_keys=True, allow_nan=False)


def aliases_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For each tensor that lies in the same memory as one before it, in the same way, the name of that one."""
    first: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for name, value in tensors.items():
        place = value.data_ptr(), value.dtype, tuple(value.shape), value.stride()
        if value.numel() and first.setdefault(place, name) != name:
            aliases[name] = first[place]
    return aliases


def _bytes(value: Tensor) -> memoryview:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the format name, the description, and each tensor's name, type, shape and bytes, by name."""
    digest = hashlib.sha256()
    layout = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in sorted(tensors)]
    digest.update(to_json([metadata["format"], metadata.get(DESCRIPTION), layout]).encode())
    for name in sorted(tensors):
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()
