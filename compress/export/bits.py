"""Codes of any width as one stream of bits: code i takes bits i*width .. (i+1)*width - 1, lowest bit first."""

import numpy as np

# Codes handled at a time, a multiple of 8 so that every chunk ends on a byte.
CHUNK = 1 << 20
WIDEST = 17


def packed_length(count: int, width: int) -> int:
    """Bytes that `count` codes of `width` bits take."""
    return (count * width + 7) // 8


def pack(codes: np.ndarray, width: int) -> np.ndarray:
    """uint8 (packed_length,) of integer codes (n,), each 0..2^width - 1; the last byte is filled with zeros.

    Raises ValueError for a width outside 1..17 or a code that does not fit.
    """
    _check_width(width)
    codes = np.ascontiguousarray(codes).reshape(-1)
    if codes.size and (int(codes.min()) < 0 or int(codes.max()) >> width):
        raise ValueError(f"codes from {codes.min()} to {codes.max()} do not fit in {width} bits")
    if width in (8, 16):
        return codes.astype(f"<u{width // 8}").view(np.uint8)
    places = np.arange(width, dtype=np.uint32)
    parts = [np.empty(0, np.uint8)]
    for start in range(0, codes.size, CHUNK):
        chunk = codes[start : start + CHUNK].astype(np.uint32)
        bits = (chunk[:, None] >> places & 1).astype(np.uint8)
        parts.append(np.packbits(bits.reshape(-1), bitorder="little"))
    return np.concatenate(parts)


def unpack(stream: np.ndarray, width: int, count: int) -> np.ndarray:
    """int32 (count,): the codes of `width` bits that `pack` made `stream` of.

    Raises ValueError for a width outside 1..17 or a stream of another length than `count` codes take.
    """
    _check_width(width)
    if stream.size != packed_length(count, width):
        raise ValueError(f"{stream.size} bytes; {count} codes of {width} bits take {packed_length(count, width)}")
    if width in (8, 16):
        return np.ascontiguousarray(stream).view(f"<u{width // 8}").astype(np.int32)
    out = np.empty(count, np.int32)
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        piece = stream[start * width // 8 : packed_length(stop, width)]
        bits = np.unpackbits(piece, count=(stop - start) * width, bitorder="little").reshape(-1, width)
        value = bits[:, 0].astype(np.int32)
        for place in range(1, width):
            value |= bits[:, place].astype(np.int32) << place
        out[start:stop] = value
    return out


def _check_width(width: int) -> None:
    if not 1 <= width <= WIDEST:
        raise ValueError(f"width: {width}; codes take 1 to {WIDEST} bits")
