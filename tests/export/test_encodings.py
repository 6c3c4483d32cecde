"""The codes of layers in one stream: each layer comes back from each encoding, and the smallest is chosen."""

import numpy as np
import pytest
import torch

from compress.export.bits import packed_length
from compress.export.encodings import (
    ENCODINGS,
    CodeReader,
    encoded_bytes,
    encoding,
    layer_bytes,
    write_codes,
    zero_points,
)
from compress.quantization.grid import Grid, code_dtype
from compress.quantization.quantized import QuantizedLayer

DRAW = np.random.default_rng(0)


def layer(shape, levels, zeros=None, spread=0.15, pruned=0.0):
    """A layer of normally distributed codes; `zeros`: the zero point of all rows, or those that they are drawn from."""
    rows = shape[0]
    zeros = levels // 2 if zeros is None else zeros
    zero_point = np.full(rows, zeros) if isinstance(zeros, int) else DRAW.choice(zeros, rows)
    offsets = np.rint(DRAW.normal(0, spread * levels, shape)) * (DRAW.random(shape) >= pruned)
    codes = np.clip(offsets + zero_point.reshape(-1, *[1] * (len(shape) - 1)), 0, levels - 1)
    scale = torch.from_numpy(DRAW.uniform(0.01, 0.1, rows).astype(np.float32))
    grid = Grid(scale, torch.from_numpy(zero_point).to(torch.int32), levels)
    return QuantizedLayer(torch.from_numpy(codes).to(code_dtype(levels)), grid, grid.bits, None)


LAYERS = {
    "two levels": layer((8, 4, 3, 3), 2),
    "three levels": layer((8, 4, 3, 3), 3),
    "mirrored": layer((64, 16, 3, 3), 4, [1, 2]),
    "one scale": layer((64, 16, 3, 3), 17, spread=0.1),
    "any levels": layer((32, 700), 700),
    "8 bit": layer((64, 64, 3, 3), 256),
    "8 bit, asymmetric": layer((64, 64, 3, 3), 256, [90, 91, 128, 200]),
    "257 levels": layer((64, 64), 257, [0, 128, 256]),
    "16 bit": layer((16, 50), 2**16),
    "2^16 + 1 levels": layer((16, 50), 2**16 + 1, [0, 2**16]),
    "pruned": layer((64, 64, 3, 3), 256, pruned=0.9),
    "pruned, 16 bit": layer((16, 5000), 2**16, pruned=0.9),
    "depthwise": layer((48, 1, 3, 3), 16),
    "Linear": layer((10, 64), 8),
    "Conv1d": layer((12, 6, 5), 5),
    "all zero": layer((64, 64, 3, 3), 4, [1, 2], spread=0),
    "all zero, pruned": layer((64, 64, 3, 3), 256, pruned=1.0),
    "one weight": layer((1, 1), 4),
    "one row": layer((1, 500), 61),
}


def back(layers, encodings):
    stream, words = write_codes(layers, encodings)
    reader = CodeReader(stream, words)
    found = []
    for each, chosen in zip(layers, encodings, strict=True):
        zeros = reader.zero_points(len(each.grid.scale), *zero_points(each.grid))
        assert np.array_equal(zeros, each.grid.zero_point.numpy())
        found.append(reader.codes(each.grid, each.codes.shape, chosen))
    reader.finish()
    return stream.size, found


@pytest.mark.parametrize("chosen", ENCODINGS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_comes_back_from_every_encoding_in_the_bytes_that_are_foretold(name, chosen):
    each = LAYERS[name]
    before = each.codes.clone()
    size, [codes] = back([each], [chosen])
    assert torch.equal(each.codes, before)
    assert codes.dtype == np.int32
    assert np.array_equal(codes, each.codes.numpy())
    zeros = 0 if each.grid.zero_point.unique().numel() == 1 else each.grid.zero_point.numel()
    zeros *= 17 / 8  # bits
    other = size - encoded_bytes(each)[chosen]  # the mark, and the zero points where they differ
    assert -4 <= other <= 12 + zeros
    assert encoded_bytes(each)["dense"] == packed_length(each.codes.numel(), each.grid.bits)


def test_all_layers_come_back_from_one_stream():
    layers = list(LAYERS.values())
    chosen = [encoding(each) for each in layers]
    assert set(chosen) == set(ENCODINGS)
    size, found = back(layers, chosen)
    assert all(np.array_equal(codes, each.codes.numpy()) for codes, each in zip(found, layers, strict=True))
    assert size >= sum(map(layer_bytes, layers))


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("one weight", "dense"),
        ("16 bit", "dense"),
        ("pruned, 16 bit", "bitmap"),
        ("8 bit", "entropy"),
        ("pruned", "entropy"),
        ("mirrored", "entropy"),
        ("all zero", "entropy"),
    ],
)
def test_the_smallest_encoding_is_chosen(name, chosen):
    each = LAYERS[name]
    assert encoding(each) == chosen
    assert layer_bytes(each) == encoded_bytes(each)[chosen] == min(encoded_bytes(each).values())
    assert encoding(each, ["dense"]) == "dense"


def test_the_same_codes_give_the_same_stream():
    layers = list(LAYERS.values())
    chosen = [encoding(each) for each in layers]
    first, second = (write_codes(layers, chosen)[0] for _ in range(2))
    assert np.array_equal(first, second)


def test_a_layer_on_equal_zero_points_takes_as_many_bytes_as_its_entropy_says():
    each = LAYERS["one scale"]
    _, counts = np.unique(each.codes.numpy(), return_counts=True)
    entropy = -(counts * np.log2(counts / counts.sum())).sum() / 8
    assert entropy < layer_bytes(each) < 1.01 * entropy + 17


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stream, words: (stream[:-1], words), "take"),
        (lambda stream, words: (np.append(stream, np.uint8(0)), words), "1 bytes behind the codes of the last layer"),
        (lambda stream, words: (stream, words + 1), "does not end with|take|table|on a grid"),
        (lambda stream, words: (stream, words - 1), "does not end with|take|table|on a grid"),
        (lambda stream, words: (stream, 0), "0 words in a stream"),
        (lambda stream, words: (stream, 10**12), "1000000000000 words in a stream"),
        (lambda stream, words: (stream, True), "True words in a stream"),
        (lambda stream, words: (stream, "1"), "1 words in a stream"),
    ],
)
def test_a_stream_of_another_length_is_refused(change, message):
    layers = [LAYERS["mirrored"], LAYERS["Linear"]]
    stream, words = change(*write_codes(layers, ["entropy", "dense"]))
    with pytest.raises(ValueError, match=message):
        read_two(stream, words, layers)


def read_two(stream, words, layers):
    reader = CodeReader(stream, words)
    for each, chosen in zip(layers, ["entropy", "dense"], strict=True):
        reader.zero_points(len(each.grid.scale), *zero_points(each.grid))
        reader.codes(each.grid, each.codes.shape, chosen)
    reader.finish()


@pytest.mark.parametrize("bounds", [(-1, 3), (3, 1), (0, 2**40), (0.0, 1), (True, 1), (None, None)])
def test_zero_points_that_no_grid_has_are_refused_before_they_cost_anything(bounds):
    stream, words = write_codes([LAYERS["mirrored"]], ["entropy"])
    with pytest.raises(ValueError, match="zero points from"):
        CodeReader(stream, words).zero_points(64, *bounds)


def test_codes_off_their_grid_are_refused():
    each = LAYERS["three levels"]
    stream, words = write_codes([each], ["dense"])
    stream[4:] = 0xFF
    with pytest.raises(ValueError, match="codes from 3 to 3 on a grid of 3 levels"):
        CodeReader(stream, words).codes(each.grid, each.codes.shape, "dense")
    with pytest.raises(ValueError, match="the encoding zip"):
        CodeReader(stream, words).codes(each.grid, each.codes.shape, "zip")
