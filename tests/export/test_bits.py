"""Streams of codes: what is packed comes back, in the number of bytes and the order of bits that the format states."""

import numpy as np
import pytest

from compress.export import bits as bits_module
from compress.export.bits import pack, packed_length, unpack


@pytest.mark.parametrize("width", range(1, 18))
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 1001])
def test_codes_come_back(width, count):
    codes = np.random.default_rng(width).integers(0, 2**width, count)
    stream = pack(codes, width)
    assert stream.dtype == np.uint8
    assert stream.size == packed_length(count, width) == -(-count * width // 8)
    assert np.array_equal(unpack(stream, width, count), codes)


@pytest.mark.parametrize("width", [1, 3, 8, 11, 16])
def test_the_stream_is_the_codes_written_out_lowest_bit_first(width):
    codes = [int(code) for code in np.random.default_rng(0).integers(0, 2**width, 13)]
    number = sum(code << (width * place) for place, code in enumerate(codes))
    assert pack(np.array(codes), width).tobytes() == number.to_bytes(packed_length(13, width), "little")


@pytest.mark.parametrize("width", [2, 3, 5, 17])
def test_long_streams_are_packed_in_chunks_without_a_seam(width, monkeypatch):
    codes = np.random.default_rng(1).integers(0, 2**width, 1003)
    whole = pack(codes, width)
    monkeypatch.setattr(bits_module, "CHUNK", 64)
    assert np.array_equal(pack(codes, width), whole)
    assert np.array_equal(unpack(whole, width, 1003), codes)


def test_codes_that_do_not_fit_and_streams_of_another_length_are_refused():
    with pytest.raises(ValueError, match="codes from 0 to 4 do not fit in 2 bits"):
        pack(np.array([0, 4]), 2)
    with pytest.raises(ValueError, match="do not fit"):
        pack(np.array([-1, 1]), 2)
    with pytest.raises(ValueError, match="width: 18"):
        pack(np.array([0]), 18)
    with pytest.raises(ValueError, match="3 bytes; 5 codes of 2 bits take 2"):
        unpack(np.zeros(3, np.uint8), 2, 5)
