"""Descriptions as compressed bytes: they come back, and what is none, or would become gigabytes, is refused."""

import zlib

import pytest

from compress.export.deflated import LONGEST, RAW, VOCABULARY, deflate, inflate


@pytest.mark.parametrize("text", ["", "{}", '{"layers":[]}', "x" * LONGEST])
def test_a_text_comes_back(text):
    assert inflate(deflate(text)) == text


def test_a_bomb_is_not_unpacked():
    compressor = zlib.compressobj(9, zlib.DEFLATED, RAW, 9, zdict=VOCABULARY)
    content = b"".join(compressor.compress(bytes(1 << 24)) for _ in range(64)) + compressor.flush()
    assert len(content) < 1.1e6
    with pytest.raises(ValueError, match="that does not end with them"):
        inflate(content)


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"x", lambda content: b""])
def test_a_stream_that_was_cut_or_goes_on_is_refused(change):
    with pytest.raises(ValueError, match="does not end with them"):
        inflate(change(deflate('{"layers":[{"bits":2}]}')))


def test_bytes_that_are_no_stream_are_refused():
    with pytest.raises(ValueError, match="invalid"):
        inflate(b"\xff" * 100)
