"""How a packed file keeps the codes of one layer: "dense" or "bitmap", whichever is smaller.

dense: the codes of all weights. bitmap: a bit for each weight that says whether it is other than zero, filled up to a
byte, and the codes of these weights alone.
"""

from typing import Literal

import numpy as np

from compress.export.bits import pack, packed_length, unpack
from compress.quantization.grid import per_channel
from compress.quantization.quantized import QuantizedLayer

Encoding = Literal["dense", "bitmap"]
# What the description of a file says more of a layer with a bitmap, in bytes.
BITMAP_NOTE = len(',"encoding":"bitmap"')


def layer_bytes(layer: QuantizedLayer) -> int:
    """What the codes of one layer take in the file, in the smaller of the encodings."""
    return min(_sizes(layer).values())


def encoding(layer: QuantizedLayer) -> Encoding:
    """The smaller of the encodings of a layer."""
    sizes = _sizes(layer)
    return min(sizes, key=sizes.__getitem__)


def encode(layer: QuantizedLayer, encoding: Encoding) -> np.ndarray:
    """uint8: the stream of bits (see `compress.export.bits`) of the codes of a layer."""
    codes = layer.codes.flatten().cpu().numpy()
    if encoding == "dense":
        return pack(codes, layer.grid.bits)
    nonzero = _nonzero(layer)
    return np.concatenate([pack(nonzero.astype(np.uint8), 1), pack(codes[nonzero], layer.grid.bits)])


def decode(stream: np.ndarray, width: int, zeros: np.ndarray, encoding: str) -> np.ndarray:
    """int32 (n,): the codes of `width` bits in a stream; `zeros` (n,) has for each weight the code that stands for 0.

    Raises ValueError for an unknown encoding and a stream of another length.
    """
    if encoding == "dense":
        return unpack(stream, width, zeros.size)
    if encoding != "bitmap":
        raise ValueError(f"the encoding {encoding}")
    head = packed_length(zeros.size, 1)
    nonzero = unpack(stream[:head], 1, zeros.size).astype(bool)
    codes = zeros.astype(np.int32)
    codes[nonzero] = unpack(stream[head:], width, int(nonzero.sum()))
    return codes


def _nonzero(layer: QuantizedLayer) -> np.ndarray:
    """Whether each weight (n,) of a layer is other than zero."""
    zero = per_channel(layer.grid.zero_point, layer.codes)
    return (layer.codes != zero.to(layer.codes.device)).flatten().cpu().numpy()


def _sizes(layer: QuantizedLayer) -> dict[Encoding, int]:
    count, width = layer.codes.numel(), layer.grid.bits
    bitmap = packed_length(count, 1) + packed_length(int(_nonzero(layer).sum()), width) + BITMAP_NOTE
    return {"dense": packed_length(count, width), "bitmap": bitmap}
