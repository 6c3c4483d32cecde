"""Learned steps: the formula and its gradients, and that baked codes compute what was trained."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compress import models
from compress.errors import UserError
from compress.export.description import NetworkDescription
from compress.export.packed import read_model, write_packed
from compress.quantization.learned_step import fake_quantize
from compress.quantization.lsq import FakeQuantization, InputStep, WeightStep, float_network, rate, steps

ABOUT = NetworkDescription(
    architecture={"stem": "resnet8", "options": {}, "num_classes": 10},
    class_names=[str(digit) for digit in range(10)],
    mean=[0.5],
    standard_deviation=[0.25],
    input_shape=[3, 8, 8],
)
SHAPE = (3, 8, 8)


def network(stem="resnet8", **options):
    """A network whose BatchNorm has statistics, and factors of either sign and zero."""
    torch.manual_seed(0)
    model = models.build(stem, 10, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            with torch.no_grad():
                module.weight[0] = 0
    return model


def images(count=16):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(model, fake, count=3):
    """The prepared `model` after `count` steps of SGD; the last of them has moved every parameter."""
    prepared = fake.prepare(model, SHAPE).train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(prepared(images()), torch.arange(16) % 10).backward()
        optimizer.step()
    return prepared


def test_values_and_gradients_are_those_of_the_paper():
    """Equations 1 to 3 of 1902.08153, one element at a time, and 5 for the scale of a step's gradient."""
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(200, dtype=torch.float64, generator=generator)).requires_grad_()
    step = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    low, high = torch.tensor(-4.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    upstream = torch.randn(200, dtype=torch.float64, generator=generator)
    out = fake_quantize(x, step, low, high, 0.25)
    (out * upstream).sum().backward()
    expected_step = 0.0
    for index in range(200):
        value = x[index].item() / 0.7
        if value <= -4:
            code, passes, slope = -4, 0, -4
        elif value >= 3:
            code, passes, slope = 3, 0, 3
        else:
            code, passes, slope = round(value), 1, round(value) - value
        assert out[index].item() == pytest.approx(0.7 * code, abs=1e-12)
        assert x.grad[index].item() == pytest.approx(passes * upstream[index].item(), abs=1e-12)
        expected_step += slope * upstream[index].item()
    assert step.grad.item() == pytest.approx(0.25 * expected_step, abs=1e-10)


def test_steps_have_the_papers_gradient_scale_and_start():
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    step = WeightStep(weight, 3)
    out = step(weight)
    out.sum().backward()
    code = (weight / step.step.detach().reshape(6, 1, 1, 1)).double()
    low = -step.zero_point.reshape(6, 1, 1, 1).double()
    clamped = code.clamp(low, low + 7)
    slope = torch.where(code == clamped, code.round() - code, clamped)
    expected = slope.sum((1, 2, 3)) / (36 * 4) ** 0.5
    torch.testing.assert_close(step.step.grad.double(), expected, rtol=1e-4, atol=1e-5)

    one_sided, two_sided = InputStep(4), InputStep(4)
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
    for quantizer, seen, highest, zero_point in ((one_sided, x.abs(), 15, 0), (two_sided, x, 7, 8)):
        assert torch.equal(quantizer.eval()(seen), seen)
        quantizer.train()(seen)
        assert quantizer.step.item() == pytest.approx((2 * x.abs().mean() / highest**0.5).item())
        assert int(quantizer.zero_point) == zero_point
        before = quantizer.step.item()
        quantizer(10 * seen)
        assert quantizer.step.item() == before


@pytest.mark.parametrize("stem", ["resnet8", "wrn_16_1"])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(2, None), (3, 4), (4, 2), (None, 8), (8, 8)])
def test_what_is_baked_and_read_back_is_what_was_trained(tmp_path, stem, weight_bits, activation_bits):
    fake = FakeQuantization(weight_bits, activation_bits)
    prepared = trained(network(stem), fake)
    prepared.eval()
    baked = fake.bake(prepared, SHAPE)
    expected = prepared(images(64)).detach()
    actual = baked.model(images(64)).detach()
    # Folding rounds once more, which moves a few inputs over the edge of a step.
    assert (actual - expected).square().mean().sqrt() < 2e-2 * expected.std()
    assert (actual.argmax(1) == expected.argmax(1)).float().mean() > 0.95
    if activation_bits is None:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    path = tmp_path / "model.safetensors"
    about = replace(ABOUT, architecture={**ABOUT.architecture, "stem": stem})
    write_packed(path, baked, about)
    read, description = read_model(path)
    assert torch.equal(read(images(64)), baked.model(images(64)))
    assert {each["name"] for each in description["layers"]} == set(baked.layers)
    assert len(description["inputs"]) == (0 if activation_bits is None else len(baked.skipped | baked.layers))


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_a_network_of_a_rate_is_read_back_as_it_was_trained(tmp_path, activation_bits):
    fake = FakeQuantization(None, activation_bits, weight_rate=2.0)
    prepared = trained(network(), fake).eval()
    baked = fake.bake(prepared, SHAPE)
    expected, actual = prepared(images(64)).detach(), baked.model(images(64)).detach()
    # Scales and biases are those of float16, and the biases are rounded to sums of codes.
    assert (actual - expected).square().mean().sqrt() < 4e-2 * expected.std()
    assert baked.rate == pytest.approx(float(rate(prepared)[1]), rel=0.05)  # codes of mirrored channels are mirrored
    halved = [layer.grid.scale for layer in baked.layers.values()]
    if activation_bits is None:
        halved += [value for name, value in baked.float_state.items() if name.endswith(".bias")]
    assert all(torch.equal(values, values.half().float()) for values in halved)

    path = tmp_path / "model.safetensors"
    write_packed(path, baked, ABOUT)
    read, _ = read_model(path)
    assert torch.equal(read(images(64)), baked.model(images(64)))
    assert path.stat().st_size < 1.1 * baked.rate * sum(each.codes.numel() for each in baked.layers.values()) / 8 + 4000


def test_baking_leaves_what_was_trained_as_it_was():
    fake = FakeQuantization(2, 4)
    prepared = trained(network(), fake)
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    expected = prepared.eval()(images())
    fake.bake(prepared, SHAPE)
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())
    assert torch.equal(prepared(images()), expected)


def test_weights_take_as_many_values_as_their_bits_allow():
    prepared = trained(network("resnet20"), FakeQuantization(2, None))
    layers = {name: layer for name, layer in prepared.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    for name, layer in layers.items():
        most = 256 if name in ("conv1", "fc") else 4
        values = max(len(channel.unique()) for channel in layer.weight)
        assert values <= most
        assert name not in ("conv1", "fc") or values > 4
    everywhere = trained(network("resnet20"), FakeQuantization(2, None, first_last_bits=None))
    assert max(len(channel.unique()) for channel in everywhere.fc.weight) <= 4


def test_skipped_layers_stay_float_and_say_so():
    fake = FakeQuantization(2, 4, skip=("layer1.*", "fc"))
    prepared = trained(network(), fake)
    baked = fake.bake(prepared, SHAPE)
    names = {name for name, each in network().named_modules() if isinstance(each, nn.Conv2d | nn.Linear)}
    left = {name for name in names if name.startswith("layer1.") or name == "fc"}
    assert set(baked.skipped) == left
    assert set(baked.layers) == names - left
    assert not hasattr(baked.model.fc, "input_quantizer")


def test_a_copy_and_a_restored_state_compute_the_same():
    fake = FakeQuantization(3, 3)
    prepared = trained(network(), fake)
    twin = copy.deepcopy(prepared)
    restored = fake.prepare(models.build("resnet8", 10), SHAPE)
    restored.load_state_dict(prepared.state_dict())
    prepared.eval()
    for other in (twin.eval(), restored.eval()):
        assert torch.equal(other(images()), prepared(images()))
    with torch.no_grad():
        twin.conv1.parametrizations.weight.original.zero_()
    assert not torch.equal(twin(images()), prepared(images()))
    assert torch.equal(restored(images()), prepared(images()))


def test_gradients_reach_weights_and_steps_in_bfloat16():
    prepared = FakeQuantization(4, 4).prepare(network(), SHAPE).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        F.cross_entropy(prepared(images()).float(), torch.arange(16) % 10).backward()
    assert all(torch.isfinite(each.grad).all() and each.grad.abs().sum() > 0 for each in steps(prepared))
    whole = FakeQuantization(4, 4).prepare(network(), SHAPE).to(torch.bfloat16).train()
    loss = F.cross_entropy(whole(images().bfloat16()), torch.arange(16) % 10)
    loss.backward()
    assert torch.isfinite(loss)


def test_the_float_network_behind_the_grids_comes_out_unchanged():
    model = network()
    prepared = FakeQuantization(2, 2).prepare(model, SHAPE)
    prepared.train()(images())
    plain = float_network(prepared)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.named_parameters())
    assert torch.equal(plain.eval()(images()), plain(images()))
    assert len(steps(prepared)) == 2 * (1 + sum(isinstance(each, nn.Conv2d) for each in model.modules()))


def test_a_diverged_network_is_refused_by_name():
    fake = FakeQuantization(2, 2)
    prepared = trained(network(), fake)
    with torch.no_grad():
        prepared.layer1[0].conv2.parametrizations.weight.original[0] = float("nan")
    with pytest.raises(UserError, match=r"^layer1\.0\.conv2: found weights or steps that are not finite"):
        fake.bake(prepared, SHAPE)


def test_a_foreign_file_with_an_input_grid_that_is_none_is_refused(tmp_path):
    fake = FakeQuantization(2, 2)
    baked = fake.bake(trained(network(), fake), SHAPE)
    baked.float_state["fc.input_quantizer.scale"] = torch.tensor(-1.0)
    write_packed(tmp_path / "model.safetensors", baked, ABOUT)
    with pytest.raises(UserError, match=r"scale: -1\.0"):
        read_model(tmp_path / "model.safetensors")
