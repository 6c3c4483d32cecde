"""How a packed file keeps the codes of its layers, one stream for all; each as "dense", "bitmap" or "entropy".

dense: the codes of all weights. bitmap: a bit for each weight that says whether it is other than zero, filled up to a
byte, and the codes of these weights alone. entropy: what codes and zero points differ by, in as many bits as its
frequency asks for, see `compress.export.entropy`. The stream is a stack, which has the codes of every layer with
"entropy" and the zero points of every layer where these are not all equal, and behind it the bytes of the others.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from compress.export.bits import pack, packed_length, unpack
from compress.export.entropy import Stack, pushed_bits
from compress.quantization.grid import Grid, per_channel
from compress.quantization.quantized import QuantizedLayer, QuantizedModel

Encoding = Literal["dense", "bitmap", "entropy"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
WORD = 4  # bytes of one of the stack


def layer_bytes(layer: QuantizedLayer) -> int:
    """What the codes of one layer take in the file, in the smallest of the encodings."""
    return min(encoded_bytes(layer).values())


def encoding(layer: QuantizedLayer, among: Sequence[Encoding] = ENCODINGS) -> Encoding:
    """The smallest of the encodings of a layer."""
    sizes = encoded_bytes(layer)
    return min(among, key=sizes.__getitem__)


def encoded_bytes(layer: QuantizedLayer) -> dict[Encoding, int]:
    """What the codes of one layer take in each of the encodings."""
    count, width = layer.codes.numel(), layer.grid.bits
    _, highest = zero_points(layer.grid)
    histogram = np.bincount(_offsets(layer), minlength=_span(layer.grid))
    nonzero = count - int(histogram[highest])
    return {
        "dense": packed_length(count, width),
        "bitmap": packed_length(count, 1) + packed_length(nonzero, width),
        "entropy": math.ceil(pushed_bits(histogram) / 8),
    }


def coded_bits(quantized: QuantizedModel) -> int:
    """The bits of the stream of codes in the file of `quantized`, with the tables, and zero points that differ."""
    layers = list(quantized.layers.values())
    stream, _ = write_codes(layers, [encoding(layer) for layer in layers])
    return 8 * stream.size


def zero_points(grid: Grid) -> tuple[int, int]:
    """The lowest and the highest zero point of a grid."""
    return int(grid.zero_point.min()), int(grid.zero_point.max())


def write_codes(layers: Sequence[QuantizedLayer], encodings: Sequence[Encoding]) -> tuple[np.ndarray, int]:
    """(the stream of codes of `layers`, uint8; how many words of it are the stack)."""
    stack = Stack()
    parts: list[np.ndarray] = []
    # What is to be read first is pushed last.
    for layer, chosen in zip(reversed(layers), reversed(encodings), strict=True):
        if chosen == "entropy":
            stack.push(_offsets(layer), _span(layer.grid))
        else:
            parts.append(_packed(layer, chosen))
        lowest, highest = zero_points(layer.grid)
        if lowest != highest:
            stack.push(layer.grid.zero_point.cpu().numpy().astype(np.int64) - lowest, highest - lowest + 1)
    words = stack.words()
    return np.concatenate([words.view(np.uint8), *reversed(parts)]), words.size


class CodeReader:
    """Reads a stream that `write_codes` wrote, layer after layer. Raises ValueError for one that is none."""

    def __init__(self, stream: np.ndarray, words: int) -> None:
        if type(words) is not int or not 0 < words <= stream.size // WORD:
            raise ValueError(f"{words} words in a stream of {stream.size} bytes")
        self._stack = Stack(np.frombuffer(stream[: WORD * words].tobytes(), "<u4"))
        self._rest = stream[WORD * words :]

    def zero_points(self, rows: int, lowest: int, highest: int) -> np.ndarray:
        """int32 (rows,): the zero points of a layer, which lie between two others or are equal to both."""
        if not all(type(bound) is int for bound in (lowest, highest)) or not 0 <= lowest <= highest < 2**17:
            raise ValueError(f"zero points from {lowest} to {highest}")
        if lowest == highest:
            return np.full(rows, lowest, np.int32)
        return self._stack.pop(rows, highest - lowest + 1) + lowest

    def codes(self, grid: Grid, shape: Sequence[int], encoding: str) -> np.ndarray:
        """int32 of that shape: the codes of a layer on `grid`."""
        count, zeros = math.prod(shape), grid.zero_point.numpy().astype(np.int32)
        if encoding == "entropy":
            codes = self._stack.pop(count, _span(grid))
            by_row = codes.reshape(len(zeros), -1)
            by_row += (zeros - zero_points(grid)[1])[:, None]
        elif encoding == "dense":
            codes = self._unpacked(grid.bits, count)
        elif encoding == "bitmap":
            nonzero = self._unpacked(1, count).astype(bool)
            codes = zeros.repeat(math.prod(shape[1:]))
            codes[nonzero] = self._unpacked(grid.bits, int(nonzero.sum()))
        else:
            raise ValueError(f"the encoding {encoding}")
        if codes.size and not (int(codes.min()) >= 0 and int(codes.max()) < grid.levels):
            raise ValueError(f"codes from {codes.min()} to {codes.max()} on a grid of {grid.levels} levels")
        return codes.reshape(shape)

    def finish(self) -> None:
        """Raises ValueError where anything is left."""
        self._stack.check_empty()
        if self._rest.size:
            raise ValueError(f"{self._rest.size} bytes behind the codes of the last layer")

    def _unpacked(self, width: int, count: int) -> np.ndarray:
        length = packed_length(count, width)
        part, self._rest = self._rest[:length], self._rest[length:]
        return unpack(part, width, count)


def _span(grid: Grid) -> int:
    """How many numbers `_offsets` can be."""
    lowest, highest = zero_points(grid)
    return grid.levels + highest - lowest


def _offsets(layer: QuantizedLayer) -> np.ndarray:
    """Integers (n,): each code less the zero point of its row, plus the highest of all zero points."""
    codes = layer.codes.cpu()
    lowest, highest = zero_points(layer.grid)
    if lowest != highest:
        codes = codes.int() - (per_channel(layer.grid.zero_point.cpu().int(), codes) - highest)
    offsets: np.ndarray = codes.flatten().numpy()
    return offsets


def _packed(layer: QuantizedLayer, encoding: Encoding) -> np.ndarray:
    """uint8: the bytes of a layer whose codes are "dense" or have a "bitmap"."""
    codes = layer.codes.flatten().cpu().numpy()
    if encoding == "dense":
        return pack(codes, layer.grid.bits)
    nonzero = _offsets(layer) != zero_points(layer.grid)[1]
    return np.concatenate([pack(nonzero.astype(np.uint8), 1), pack(codes[nonzero], layer.grid.bits)])
