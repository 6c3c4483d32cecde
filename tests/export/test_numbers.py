"""Tensors in the narrowest type that keeps their bits."""

import pytest
import torch

from compress.export.numbers import NumberReader, NumberWriter

NAN = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
VALUES = [
    (torch.tensor([1.5, -0.0, 0.0, 65504.0, 2**-24, float("inf")]), "float16"),
    (torch.tensor([0.1]), "float32"),
    (torch.tensor([65520.0]), "float32"),
    (torch.tensor([2**-25]), "float32"),
    (NAN, "float32"),
    (torch.tensor(0.25), "float16"),
    (torch.tensor([], dtype=torch.float32), "float16"),
    (torch.tensor([0.1], dtype=torch.float64), "float64"),
    (torch.tensor([0.1]).double(), "float32"),
    (torch.tensor([0.1], dtype=torch.bfloat16), "float16"),
    (torch.tensor([1e30], dtype=torch.bfloat16), "float32"),
    (torch.tensor([[0, 255]]), "uint8"),
    (torch.tensor([-128, 127]), "int8"),
    (torch.tensor([-129]), "int16"),
    (torch.tensor([32768], dtype=torch.int32), "int32"),
    (torch.tensor([2**40]), "int64"),
    (torch.tensor([True, False]), "uint8"),
]


@pytest.mark.parametrize(("value", "kept_in"), VALUES)
def test_every_bit_comes_back_from_the_narrowest_type(value, kept_in):
    writer = NumberWriter()
    assert writer.add(value) == kept_in
    assert list(writer.streams()) == [kept_in]
    reader = NumberReader(writer.streams())
    found = reader.take(value.shape, value.dtype, kept_in)
    reader.finish()
    assert found.dtype == value.dtype
    assert found.shape == value.shape
    assert torch.equal(found.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))


def test_there_is_one_stream_for_each_type_in_the_order_of_the_tensors():
    writer = NumberWriter()
    for value, _ in VALUES:
        writer.add(value)
    streams = writer.streams()
    assert {name: str(stream.dtype) for name, stream in streams.items()} == {name: f"torch.{name}" for name in streams}
    reader = NumberReader(streams)
    for value, kept_in in VALUES:
        assert torch.equal(reader.take(value.shape, value.dtype, kept_in), value) or value is NAN
    reader.finish()


def test_too_few_too_many_and_unknown_numbers_are_refused():
    streams = {"float16": torch.zeros(3, dtype=torch.float16)}
    with pytest.raises(ValueError, match="a stream of float16 that ends before its network"):
        NumberReader(streams).take((2, 2), torch.float32, "float16")
    with pytest.raises(ValueError, match="ends before"):
        NumberReader(streams).take((1,), torch.float32, "float32")
    with pytest.raises(ValueError, match=r"torch.float32 in float64"):
        NumberReader(streams).take((1,), torch.float32, "float64")
    with pytest.raises(ValueError, match="ends before"):
        NumberReader({"float16": torch.zeros(3)}).take((1,), torch.float32, "float16")
    reader = NumberReader(streams)
    reader.take((2,), torch.float32, "float16")
    with pytest.raises(ValueError, match="a stream of float16 with 1 numbers too many"):
        reader.finish()
