"""Patches and their Grams against torch's own convolution, whatever its geometry, and against whole-set products."""

import pytest
import torch
from torch import nn

from compress.quantization import moments as moments_module
from compress.quantization.moments import Moments
from compress.quantization.patches import live_columns, patches

CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2)},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2},
    {"kernel_size": (2, 3), "padding": "same", "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 5, "padding": 3, "padding_mode": "circular", "stride": 2},
    {"kernel_size": 1, "stride": 2},
]


@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
def test_weights_times_patches_is_the_convolution(geometry):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, **geometry, bias=False).double()
    images = torch.randn(3, 4, 7, 6, dtype=torch.float64)
    columns = patches(layer, images)
    weight = layer.weight.reshape(layer.groups, 8 // layer.groups, -1)
    product = (weight @ columns).reshape(8, 3, -1).transpose(0, 1)
    torch.testing.assert_close(product, layer(images).flatten(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Linear(4, 6), nn.Conv2d(60, 2, 3)])
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("chunk", [1 << 24, 500])
def test_moments_over_chunks_equal_products_over_the_whole_set(layer, centre, chunk, monkeypatch):
    monkeypatch.setattr(moments_module, "CHUNK", chunk)
    torch.manual_seed(1)
    shape = (7, 5, 4) if isinstance(layer, nn.Linear) else (7, layer.in_channels, 5, 5)
    analog = torch.rand(shape, dtype=torch.float64)
    quantized = analog + 0.1 * torch.randn(shape, dtype=torch.float64)
    moments = Moments(layer, torch.float64, centre)
    for start, stop in ((0, 3), (3, 3), (3, 4), (4, 7)):
        moments.update(quantized[start:stop], analog[start:stop])
    gram, cross, mean_quantized, mean_analog = moments.finished
    for group, (mine, other) in enumerate(zip(patches(layer, quantized), patches(layer, analog), strict=True)):
        torch.testing.assert_close(mean_quantized[group], mine.mean(1))
        torch.testing.assert_close(mean_analog[group], other.mean(1))
        if centre:
            mine, other = mine - mine.mean(1, keepdim=True), other - other.mean(1, keepdim=True)
        torch.testing.assert_close(gram[group], mine @ mine.T, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(cross[group], mine @ other.T, rtol=1e-9, atol=1e-9)


def test_the_same_inputs_on_both_sides_give_the_same_gram_twice():
    layer = nn.Linear(5, 2)
    inputs = torch.randn(9, 5)
    moments = Moments(layer, torch.float64, centre=True)
    moments.update(inputs, inputs)
    gram, cross, _, _ = moments.finished
    centred = (inputs - inputs.mean(0)).double()
    torch.testing.assert_close(gram[0], centred.T @ centred, rtol=1e-6, atol=1e-6)
    assert torch.equal(gram, cross)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_input_that_never_changes_is_dead_once_centred(dtype):
    torch.manual_seed(2)
    inputs = torch.randn(1000, 3)
    inputs[:, 0] = 1 + 1e-3 * inputs[:, 0]
    inputs[:, 1] = 0.1
    moments = Moments(nn.Linear(3, 2), dtype, centre=True)
    moments.update(inputs, inputs + 1)
    gram, cross, mean_quantized, _ = moments.finished
    assert gram[0, 1].tolist() == gram[0, :, 1].tolist() == cross[0, 1].tolist() == [0.0, 0.0, 0.0]
    expected = inputs[:, 0].double().var(unbiased=False) * 1000
    assert gram[0, 0, 0].item() == pytest.approx(expected.item(), rel=1e-3)
    assert mean_quantized[0, 1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("size", "geometry", "taps"),
    [
        (1, {"kernel_size": 3, "padding": 1}, [4]),
        (2, {"kernel_size": 3, "padding": 1}, None),
        (2, {"kernel_size": 3, "padding": 1, "stride": 2}, [4, 5, 7, 8]),
        (1, {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"}, None),
        (2, {"kernel_size": 3, "padding": 2, "dilation": 2}, [4]),
    ],
)
def test_only_kernel_positions_that_meet_a_pixel_are_counted(size, geometry, taps):
    layer = nn.Conv2d(2, 3, **geometry)
    live = live_columns(layer, torch.zeros(1, 2, size, size))
    assert (live if live is None else live.tolist()) == (taps and taps + [9 + tap for tap in taps])
