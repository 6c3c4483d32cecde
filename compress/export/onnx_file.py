"""ONNX files `compress-onnx-1`: what one says of itself, read and checked before any runtime sees its graph.

The metadata of the model hold the name of the format, the description that packed files have too, as JSON, and a
checksum over the file. Reading them needs no runtime.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.export.description import check_description

FORMAT = "compress-onnx-1"
INPUT, OUTPUT = "images", "logits"
UNSIGNED = b"0" * 64  # stands for the checksum while it is computed, the SHA-256 of the file


@dataclass(frozen=True)
class Containers:
    """The integers of weights that a runtime computes with.

    weights, with_inputs: bits of its narrowest type, for weights alone and for those of layers whose inputs are
    quantized as well. zero_points: whether its integer kernels take zero points of weights other than 0. sums: whether
    they want biases, and both inputs of residual additions, on integers as well, which rounds these once more.
    """

    weights: int = 2
    with_inputs: int = 2
    zero_points: bool = True
    sums: bool = True


def read_onnx(path: Path, suffix: str) -> tuple[bytes, dict[str, Any]]:
    """(content, description) of a file that ends with `suffix`.

    Raises UserError, naming the file, where it is missing, damaged, altered or not written by compress, for weights in
    another file, which no checksum here covers, and for operators that hold a graph, which may run for ever, or
    functions, which may hold one: runtimes compute what is constant while they load a file.
    """
    accepted = f"accepted: a {suffix} file that compress wrote"
    if not path.is_file():
        raise UserError(f"{path}: found no such file; {accepted}")
    content = path.read_bytes()
    # ModelProto: 7 the graph, 14 the metadata, 25 functions; GraphProto: 1 the nodes, 5 tensors, 15 sparse ones;
    # NodeProto: 5 the attributes; AttributeProto: 5 and 10 tensors, 22 and 23 sparse ones, 6 and 11 graphs;
    # TensorProto: 13 where another file has it; StringStringEntryProto: 1 the key, 2 the value (onnx.proto).
    try:
        model = [*_fields(memoryview(content))]
        metadata = dict(_entry(entry) for number, entry in model if number == 14)
        graph = [field for number, part in model if number == 7 for field in _fields(part)]
        attributes = [
            field
            for number, node in graph
            if number == 1
            for one, attribute in _fields(node)
            if one == 5
            for field in _fields(attribute)
        ]
        graphs = any(number in (6, 11) for number, _ in attributes)
        sparse = any(number == 15 for number, _ in graph) or any(number in (22, 23) for number, _ in attributes)
        tensors = [tensor for number, tensor in graph if number == 5]
        tensors += [tensor for number, tensor in attributes if number in (5, 10)]
        elsewhere = sparse or any(number == 13 for tensor in tensors for number, _ in _fields(tensor))
    except (IndexError, ValueError):
        raise UserError(f"{path}: found a truncated file or none of the ONNX format; {accepted}") from None
    if graphs or any(number == 25 for number, _ in model):
        raise UserError(f"{path}: found operators that hold a graph, such as loops; {accepted}")
    if elsewhere:
        raise UserError(f"{path}: found tensors in another file, or sparse ones; {accepted}")
    if not any(number == 7 for number, _ in model):
        raise UserError(f"{path}: found a truncated file or none of the ONNX format; {accepted}")
    if metadata.get("format") != FORMAT or not {"description", "sha256"} <= metadata.keys():
        raise UserError(f"{path}: found an ONNX file without a description of its model; {accepted}")
    stated = metadata["sha256"]
    if len(stated) != len(UNSIGNED) or sha256(content.replace(stated.encode(), UNSIGNED)).hexdigest() != stated:
        raise UserError(
            f"{path}: found content that does not match its checksum, so it was cut short or altered; {accepted}"
        )
    try:
        return content, {"format": FORMAT, **json.loads(metadata["description"])}
    except (TypeError, ValueError, RecursionError):
        raise UserError(f"{path}: found a description that is not a JSON object; {accepted}") from None


def check_graph(path: Path, description: Mapping[str, Any], images: Sequence[object], logits: Sequence[object]) -> None:
    """Raises UserError, naming the file, where a `description` is not that of a network of these shapes.

    images, logits: the sizes of its input and output as a runtime has them, the batch first; no number where it may be
    any.
    """
    try:
        check_description(description, logits[-1] if logits and isinstance(logits[-1], int) else 0)
    except UserError as mistake:
        raise UserError(f"{path}: {mistake}") from None
    stated = description["input_shape"]
    sizes = [size if isinstance(size, int) else given for size, given in zip(images[1:], stated, strict=False)]
    if len(images) != 4 or sizes != stated:
        raise UserError(f"{path}: input_shape: found {stated} for a network of {sizes}; accepted: that of its network")


def _entry(message: memoryview) -> tuple[str, str]:
    """Key and value of a StringStringEntryProto."""
    content = {number: bytes(field).decode() for number, field in _fields(message)}
    return content.get(1, ""), content.get(2, "")


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of every field of a Protocol Buffers `message` that has a length.

    Raises ValueError or IndexError where it is none. Format: protobuf.dev/programming-guides/encoding.
    """
    place = 0

    def varint() -> int:
        nonlocal place
        value = 0
        for shift in range(0, 70, 7):
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number of more than ten bytes")

    while place < len(message):
        tag = varint()
        if tag >= 1 << 32:  # other readers drop what is above
            raise ValueError("a number of a field of more than 29 bits")
        number, kind = divmod(tag, 8)
        if kind == 0:
            varint()
            continue
        length = {1: 8, 5: 4}.get(kind) if kind != 2 else varint()
        if length is None or place + length > len(message):
            raise ValueError(f"a field of the kind {kind}")
        if kind == 2:
            yield number, message[place : place + length]
        place += length
