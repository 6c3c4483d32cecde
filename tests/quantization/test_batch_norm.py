"""Re-estimated normalisation: the statistics of a quantized network's channels are those of the float one."""

import pytest
import torch
from torch import nn

from compress.errors import UserError
from compress.quantization import Correction, GridOptions, quantize


def network(folds: bool) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)]
    if not folds:
        layers.insert(1, nn.ReLU())
        layers.insert(5, nn.ReLU())
    model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(64, 3, 10, 10) + 0.3)
    return model.eval()


@pytest.fixture
def batches():
    return [torch.randn(48, 3, 10, 10, generator=torch.Generator().manual_seed(3)) + 0.3 for _ in range(2)]


def channel_statistics(model, name, batches):
    found = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, __, output: found.append(output))
    with torch.no_grad():
        for batch in batches:
            model(batch.clone())
    hook.remove()
    values = torch.cat(found).transpose(0, 1).flatten(1)
    return values.mean(1), values.std(1, correction=0)


def test_a_folded_layer_gets_the_mean_and_deviation_of_its_channels_back(batches):
    model = network(folds=True)
    plain = quantize(model, batches, 2, first_last_bits=None)
    matched = quantize(model, batches, 2, first_last_bits=None, correction=Correction(batch_norm=True))
    for layer, norm in (("0", "1"), ("3", "4")):
        mean, deviation = channel_statistics(model, norm, batches)
        new_mean, new_deviation = channel_statistics(matched.model, layer, batches)
        torch.testing.assert_close(new_mean, mean, rtol=2e-3, atol=1e-3)
        torch.testing.assert_close(new_deviation, deviation, rtol=1e-3, atol=1e-4)
        _, lost = channel_statistics(plain.model, layer, batches)
        assert (lost / deviation - 1).abs().max() > 0.01
    weight = matched.model.get_submodule("0").weight
    assert torch.equal(weight, matched.layers["0"].grid.dequantize(matched.layers["0"].codes))


def test_a_norm_that_stands_alone_has_its_statistics_moved(batches):
    model = network(folds=False)
    matched = quantize(model, batches, 2, first_last_bits=None, correction=Correction(batch_norm=True))
    assert matched.folded == []
    for norm in ("2", "6"):
        mean, deviation = channel_statistics(model, norm, batches)
        new_mean, new_deviation = channel_statistics(matched.model, norm, batches)
        torch.testing.assert_close(new_mean, mean, rtol=0, atol=0.02)
        torch.testing.assert_close(new_deviation, deviation, rtol=1e-2, atol=1e-3)
    assert torch.equal(model[2].running_mean, network(folds=False)[2].running_mean), "the caller's model is as it was"


def test_one_scale_a_layer_cannot_be_matched_by_channel(batches):
    one_scale, matching = GridOptions(granularity="layer"), Correction(batch_norm=True)
    with pytest.raises(UserError, match=r"^correction\.batch_norm: found true with one scale a layer"):
        quantize(network(True), batches, 2, grid=one_scale, correction=matching)


def test_a_norm_that_takes_the_statistics_of_each_batch_is_left_as_it_is(batches):
    model = network(folds=False)
    model[2] = nn.BatchNorm2d(8, track_running_stats=False).eval()
    matched = quantize(model, batches, 4, first_last_bits=None, correction=Correction(batch_norm=True))
    assert matched.model.get_submodule("2").running_mean is None
