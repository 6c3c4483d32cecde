"""Files of LiteRT, `.tflite`: tensors and operators put together, and what such a file says of itself.

The format is a FlatBuffer (ai.google.dev/edge/litert, `schema.fbs`); the package `ai_edge_litert` has the classes of
its schema. A metadata buffer, the place for what an app should know, holds the description that packed files have too,
as JSON, with a checksum over the file.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import UserError
from compress.export.container import to_json

FORMAT = "compress-litert-1"
INPUT, OUTPUT = "images", "logits"
UNSIGNED = b"0" * 64  # stands for the checksum while it is computed, the SHA-256 of the file
SIGNED = b'"sha256": "'
IDENTIFIER, ALIGNMENT = b"TFL3", 16  # schema.fbs: file_identifier, force_align of a buffer
VERSION = 3  # of the schema
FIRST_VERSIONS = {"BROADCAST_TO": 2}  # of operators that a runtime does not have in version 1
LAST_SMALL_CODE = 127  # schema.fbs: what the older field for the code of an operator says for all from there on
# schema.fbs: the table with the options of an operator, if it has one.
OPTIONS = {
    "ADD": "AddOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "CONCATENATION": "ConcatenationOptions",
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "DEQUANTIZE": "DequantizeOptions",
    "DIV": "DivOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "GELU": "GeluOptions",
    "LEAKY_RELU": "LeakyReluOptions",
    "MAXIMUM": "MaximumMinimumOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "MEAN": "ReducerOptions",
    "MINIMUM": "MaximumMinimumOptions",
    "MUL": "MulOptions",
    "PAD": "PadOptions",
    "PADV2": "PadV2Options",
    "QUANTIZE": "QuantizeOptions",
    "REDUCE_MAX": "ReducerOptions",
    "RESHAPE": "ReshapeOptions",
    "SHAPE": "ShapeOptions",
    "SOFTMAX": "SoftmaxOptions",
    "STRIDED_SLICE": "StridedSliceOptions",
    "SUB": "SubOptions",
    "SUM": "ReducerOptions",
    "TRANSPOSE": "TransposeOptions",
}


@dataclass(frozen=True)
class Quantization:
    """value = scale * (code - zero_point), for all of a tensor or, with several, along its dimension `dimension`."""

    scale: Sequence[float]
    zero_point: Sequence[int]
    dimension: int = 0


class GraphFile:
    """The tensors, operators and constants of one graph, in the order in which they are added."""

    def __init__(self) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.schema = schema
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        self._codes: dict[str, int] = {}  # the operators, and where they are in the table of codes
        self._buffers: list[bytes] = [b""]  # the first one stands for none
        self._constants: dict[tuple[bytes, str, tuple[int, ...], str], int] = {}

    def tensor(
        self,
        sizes: Sequence[int],
        kind: str = "FLOAT32",
        quantization: Quantization | None = None,
        content: bytes = b"",
    ) -> int:
        """The number of a new tensor; a size of -1 is for any number, and 1 in the file."""
        tensor = self.schema.TensorT()
        tensor.shape = [abs(size) for size in sizes]
        if any(size < 0 for size in sizes):
            tensor.shapeSignature = [max(size, -1) for size in sizes]
        tensor.hasRank = True
        tensor.type = getattr(self.schema.TensorType, kind)
        tensor.name = f"t{len(self._tensors)}"
        if quantization is not None:
            found = tensor.quantization = self.schema.QuantizationParametersT()
            found.scale, found.zeroPoint = [*quantization.scale], [*quantization.zero_point]
            found.quantizedDimension = quantization.dimension
        if content:
            tensor.buffer = len(self._buffers)
            self._buffers.append(content)
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def constant(self, values: np.ndarray, kind: str, quantization: Quantization | None = None) -> int:
        """The number of a tensor with these `values`; INT4 ones are int8 here and halves of bytes in the file."""
        content = np.ascontiguousarray(values).tobytes()
        if kind == "INT4":
            nibbles = np.append(values.astype(np.uint8).ravel() & 15, np.zeros(values.size % 2, np.uint8))
            content = (nibbles[::2] | nibbles[1::2] << 4).tobytes()
        key = content, kind, values.shape, repr(quantization)
        if key not in self._constants:
            self._constants[key] = self.tensor(values.shape, kind, quantization, content)
        return self._constants[key]

    def operator(
        self, name: str, inputs: Sequence[int], outputs: Sequence[int], kind: str | None = None, **options: Any
    ) -> None:
        """Adds the operator `name` of schema.fbs; `kind` is that of its options there and `options` their fields."""
        operator = self.schema.OperatorT()
        operator.opcodeIndex = self._codes.setdefault(name, len(self._codes))
        operator.inputs, operator.outputs = [*inputs], [*outputs]
        kind = OPTIONS.get(name)
        if kind is not None:
            operator.builtinOptionsType = getattr(self.schema.BuiltinOptions, kind)
            operator.builtinOptions = getattr(self.schema, f"{kind}T")()
            for field, value in options.items():
                setattr(operator.builtinOptions, field, value)
        self._operators.append(operator)

    def packed(self, images: int, logits: int, description: Mapping[str, Any]) -> bytes:
        """The content of the file, whose input and output are these tensors. The same graph gives the same bytes."""
        import flatbuffers

        schema = self.schema
        text = to_json({"format": FORMAT, **description})
        content = SIGNED + UNSIGNED + b'", ' + text.encode()[1:]
        metadata = schema.MetadataT()
        metadata.name, metadata.buffer = FORMAT, len(self._buffers)
        model = schema.ModelT()
        model.version, model.description, model.metadata = VERSION, FORMAT, [metadata]
        model.buffers = [_aligned(schema, data) for data in [*self._buffers, b"{" + content]]
        model.operatorCodes = []
        for name in self._codes:
            entry, code = schema.OperatorCodeT(), getattr(schema.BuiltinOperator, name)
            entry.builtinCode, entry.deprecatedBuiltinCode = code, min(code, LAST_SMALL_CODE)
            entry.version = FIRST_VERSIONS.get(name, 1)
            model.operatorCodes.append(entry)
        graph = schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = "main", self._tensors, self._operators
        graph.inputs, graph.outputs = [images], [logits]
        self._tensors[images].name, self._tensors[logits].name = INPUT, OUTPUT
        model.subgraphs = [graph]
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs, signature.outputs = ([_entry(schema, *pair)] for pair in ((INPUT, images), (OUTPUT, logits)))
        model.signatureDefs = [signature]
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
        unsigned = bytes(builder.Output())
        return unsigned.replace(SIGNED + UNSIGNED, SIGNED + sha256(unsigned).hexdigest().encode())


def _entry(schema: Any, name: str, tensor: int) -> Any:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name, tensor
    return entry


def _aligned(schema: Any, data: bytes) -> Any:
    """A buffer that lies where kernels may read numbers of any type, which the classes of the schema do not see to."""

    class Buffer(schema.BufferT):  # type: ignore[misc]
        def Pack(self, builder: Any) -> int:  # noqa: N802 - the schema's own name
            if not data:
                return int(super().Pack(builder))
            builder.StartVector(1, len(data), ALIGNMENT)
            builder.head = builder.Head() - len(data)
            builder.Bytes[builder.Head() : builder.Head() + len(data)] = data
            vector = builder.EndVector()
            schema.BufferStart(builder)
            schema.BufferAddData(builder, vector)
            return int(schema.BufferEnd(builder))

    return Buffer()


def read_litert(path: Path, suffix: str) -> tuple[bytes, dict[str, Any]]:
    """(content, description) of a file that ends with `suffix`.

    Raises UserError, naming the file, where it is missing, damaged, altered or not written by compress.
    """
    from ai_edge_litert import schema_py_generated as schema

    accepted = f"accepted: a {suffix} file that compress wrote"
    if not path.is_file():
        raise UserError(f"{path}: found no such file; {accepted}")
    content = path.read_bytes()
    if content[4:8] != IDENTIFIER:
        raise UserError(f"{path}: found a truncated file or none of the LiteRT format; {accepted}")
    try:
        model = schema.Model.GetRootAs(content)
        entries = [model.Metadata(index) for index in range(min(model.MetadataLength(), 16))]
        texts = [
            model.Buffers(entry.Buffer()).DataAsNumpy().tobytes()
            for entry in entries
            if entry.Name() == FORMAT.encode()
        ]
    except Exception:  # of FlatBuffers, which follows whatever offsets it finds
        raise UserError(f"{path}: found a truncated file or none of the LiteRT format; {accepted}") from None
    if not texts:
        raise UserError(f"{path}: found a LiteRT file without a description of its model; {accepted}")
    start = 1 + len(SIGNED)
    stated = texts[0][start : start + len(UNSIGNED)]
    if sha256(content.replace(SIGNED + stated, SIGNED + UNSIGNED)).hexdigest().encode() != stated:
        raise UserError(
            f"{path}: found content that does not match its checksum, so it was cut short or altered; {accepted}"
        )
    try:
        description: dict[str, Any] = json.loads(texts[0])
        del description["sha256"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{path}: found a description that is not a JSON object; {accepted}") from None
    return content, description
