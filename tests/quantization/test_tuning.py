"""Tuning beside codes: the logits come nearer, the codes and the size of the file stay."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compress.arguments import build
from compress.errors import UserError
from compress.export.description import NetworkDescription
from compress.export.packed import file_bytes, read_model, write_packed
from compress.models import own_class
from compress.quantization import Correction, Measures, Options, Quantizer, Tuning, quantize
from compress.quantization.activations import InputQuantizer, input_quantizers
from compress.quantization.preparation import prepare
from compress.quantization.quantized import float_state
from compress.quantization.rates import RateQuantization
from compress.quantization.solvers import RTN
from compress.quantization.tuning import Tuner, _as_precise, _StraightThrough
from tests.models.odd_networks import CLASSES, SHAPE, TiedWeights, make

TUNING = Tuning(images=96, epochs=8, learning_rate=1e-2, batch_size=16)
# What leaves most to do.
CRUDE = {"correction": Correction(bias=False)}
DIVERGED = r"^quantizer.tune: found logits that are not finite at the learning_rate 1e\+06; accepted: a lower one$"


class Norms(nn.Module):
    """A norm that folds into the layer before it, two that stand alone, and scales that differ by channel."""

    def __init__(self):
        super().__init__()
        self.stem, self.folded = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.alone, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=2)
        self.line, self.head = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, images):
        hidden = F.relu(self.folded(self.stem(images)), inplace=True)
        hidden = hidden + 1
        hidden = F.relu(self.conv(self.alone(hidden)))
        return self.head(self.line(hidden.mean((2, 3))))


class Early(nn.Module):
    """A norm and a layer that stays float before the first that is quantized, and images that are changed in place."""

    def __init__(self):
        super().__init__()
        self.norm, self.stem = nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3)
        self.conv, self.head = nn.Conv2d(6, 6, 3), nn.Linear(6, CLASSES)

    def forward(self, images):
        hidden = F.relu(self.stem(self.norm(images.sub_(1.0))))
        return self.head(F.relu(self.conv(hidden)).mean((2, 3)))


def images(count=96, seed=1):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def network(kind=Norms):
    model = make(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # so that classes are told apart
    return model


def at_rate(model, rate=1.25):
    return RateQuantization(Options(**CRUDE), model, [images()])(rate)


def tuned(model, quantized, tuning=TUNING, batches=None):
    skip = [name for name in ("stem",) if name in quantized.skipped]
    return Tuner(tuning, prepare(model, [images()], skip), batches or [images()])(quantized)


def divergence(quantized, model, count=96, seed=1):
    with torch.no_grad():
        pair = [each(images(count, seed)).log_softmax(1) for each in (quantized.model, model)]
    return F.kl_div(*pair, reduction="batchmean", log_target=True).item()


def description(model):
    architecture = {"stem": own_class.STEM, "options": own_class.options_of(model), "num_classes": CLASSES}
    return NetworkDescription(architecture, list("abcd"), [0.0], [1.0], SHAPE)


@pytest.fixture(scope="module", params=["2 bit", "1.25 bits/weight", "2 bit, inputs 4 bit", "tied", "early"])
def pair(request):
    """(float network, quantized network, tuned network)."""
    model = network({"tied": TiedWeights, "early": Early}.get(request.param, Norms))
    options = {"activation_bits": 4} if "inputs" in request.param else {}
    options |= {"skip": ["stem"]} if request.param == "early" else {}
    if "weight" in request.param or request.param == "tied":
        quantized = at_rate(model, 1.0 if request.param == "tied" else 1.25)
    else:
        quantized = quantize(model, [images()], 2, solver=RTN(), first_last_bits=None, **CRUDE, **options)
    return model, quantized, tuned(model, quantized)


def test_the_divergence_falls_on_its_images_and_on_others(pair):
    model, before, after = pair
    assert divergence(after, model) < 0.95 * divergence(before, model)
    assert divergence(after, model, 1000, seed=2) < divergence(before, model, 1000, seed=2)


def test_codes_stay_and_weights_lie_on_their_grids(pair):
    _, before, after = pair
    for name, layer in after.layers.items():
        assert torch.equal(layer.codes, before.layers[name].codes)
        assert torch.equal(layer.grid.zero_point, before.layers[name].grid.zero_point)
        assert len(layer.grid.scale.unique()) == len(before.layers[name].grid.scale.unique())
        weight = after.model.get_submodule(name).weight
        assert torch.equal(weight, layer.grid.dequantize(layer.codes))
        assert not torch.equal(weight, before.model.get_submodule(name).weight)
    assert (after.folded, after.skipped, after.tied) == (before.folded, before.skipped, before.tied)


def test_the_file_keeps_its_size_and_reads_back_bit_for_bit(pair, tmp_path):
    model, before, after = pair
    assert file_bytes(after, description(model)) == file_bytes(before, description(model))
    write_packed(tmp_path / "tuned.safetensors", after, description(model))
    read, _ = read_model(tmp_path / "tuned.safetensors", type(model))
    with torch.no_grad():
        assert torch.equal(read(images(8)), after.model(images(8)))
    state = float_state(after.model, [*after.layers, *after.tied])
    assert state.keys() == after.float_state.keys()
    assert all(torch.equal(value, after.float_state[name]) for name, value in state.items())


def test_the_errors_of_layers_are_those_of_the_tuned_network(pair):
    model, before, after = pair
    analog = prepare(model, [images()]).analog
    name = list(after.layers)[-1]
    outputs = []
    for each in (after.model, analog):
        layer = each.get_submodule(name)
        handle = layer.register_forward_hook(lambda layer, arguments, output: outputs.append(output))
        with torch.no_grad():
            each(images())
        handle.remove()
    found, expected = outputs
    error = (found - expected).norm() / (expected - analog.get_submodule(name).bias).norm()
    assert after.layers[name].error == pytest.approx(error.item(), rel=1e-3)
    assert after.layers[name].error != before.layers[name].error


def test_neither_the_network_nor_the_quantized_one_changes():
    model = network()
    quantized = quantize(model, [images()], 2)
    kept = [copy.deepcopy(each.state_dict()) for each in (model, quantized.model)]
    tuned(model, quantized)
    for each, before in zip((model, quantized.model), kept, strict=True):
        assert all(torch.equal(value, before[name]) for name, value in each.state_dict().items())
        assert all(parameter.grad is None for parameter in each.parameters())


def test_what_norms_that_stand_alone_multiply_and_add_is_tuned_and_their_statistics_stay():
    model = network()
    quantized = quantize(model, [images()], 2)
    before, after = quantized.float_state, tuned(model, quantized).float_state
    for name in ("alone.weight", "alone.bias", "line.weight", "line.bias", "stem.bias", "head.bias"):
        assert not torch.equal(before[name], after[name])
    for name in ("alone.running_mean", "alone.running_var"):
        assert torch.equal(before[name], after[name])


def test_layers_that_share_a_weight_still_do():
    model = network(TiedWeights)
    after = tuned(model, at_rate(model))
    assert after.tied == {"right": "left"}
    assert after.model.right.weight is after.model.left.weight
    assert not torch.equal(after.model.right.bias, after.model.left.bias)


def test_gradients_pass_quantized_inputs_and_their_grids_stay():
    model = network()
    before = quantize(model, [images()], 4, activation_bits=4)
    after = tuned(model, before)
    assert not torch.equal(after.float_state["stem.bias"], before.float_state["stem.bias"])
    grids = [input_quantizers(each.model) for each in (before, after)]
    assert grids[0].keys() == grids[1].keys() != set()
    for name, grid in grids[0].items():
        assert type(grids[1][name]) is InputQuantizer
        assert torch.equal(grid.scale, grids[1][name].scale)
        assert torch.equal(grid.zero_point, grids[1][name].zero_point)


def test_while_it_is_trained_a_network_computes_on_the_same_inputs():
    grid = InputQuantizer(0.37, 3, 16)
    x = 3 * torch.randn(10_000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    passed = _StraightThrough(grid)(x)
    assert torch.equal(passed, grid(x))
    [gradient] = torch.autograd.grad(passed.sum(), x)
    on_grid = (x >= -3 * 0.37) & (x <= 12 * 0.37)
    assert torch.allclose(gradient, on_grid.float())
    assert not on_grid.all()


def test_the_order_of_the_images_follows_from_the_seed():
    model = network()
    quantized = quantize(model, [images()], 2)
    first, again, other = (
        tuned(model, quantized, Tuning(images=96, batch_size=16, seed=seed)).float_state["head.bias"]
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_more_images_are_seen_than_asked_for():
    model = network()
    quantized = quantize(model, [images()], 2)
    few = Tuning(images=40, batch_size=16)
    split = [images()[:24], images()[24:]]
    first, other = (tuned(model, quantized, few, batches) for batches in ([images()[:40]], split))
    assert torch.equal(first.float_state["head.bias"], other.float_state["head.bias"])


def variants(quantizer, model, accuracy=lambda each: 1.0, *tuning_batches):
    measures = Measures(lambda each: file_bytes(each, description(model)), 10_000, accuracy)
    return list(quantizer.variants(model, [images()], measures, lambda *done: None, *tuning_batches))


@pytest.mark.parametrize("options", [{"bits": 2, "rates": 1.5}, {"bits": [], "budget": 900}])
def test_every_variant_is_tuned_and_a_budget_kept(options):
    model = network()
    plain, tuning = (variants(Quantizer(**options, tune=tune), model) for tune in (None, TUNING))
    for before, after in zip(plain, tuning, strict=True):
        assert divergence(after.model, model) < divergence(before.model, model)
        size, smaller = (file_bytes(each.model, description(model)) for each in (before, after))
        assert size == smaller
        assert (after.label, after.word) == (before.label, before.word)


@pytest.mark.slow
def test_a_drop_is_that_of_the_tuned_network():
    model, tried = network(), []

    def accuracy(each):
        tried.append(each)
        return 1.0 if len(tried) < 3 else 0.0

    [found] = variants(Quantizer(bits=[], max_drop=1, tune=Tuning(images=16)), model, accuracy)
    assert found.model.model is tried[1]


def test_other_images_than_those_of_the_walk_are_tuned_on():
    model, quantizer = network(), Quantizer(bits=2, tune=TUNING)
    [one], [other] = variants(quantizer, model), variants(quantizer, model, None, [images(seed=5)])
    assert all(torch.equal(layer.codes, other.model.layers[name].codes) for name, layer in one.model.layers.items())
    assert not torch.equal(one.model.float_state["head.bias"], other.model.float_state["head.bias"])


def test_an_estimate_of_sizes_does_without():
    assert Quantizer(bits=2, tune=TUNING).roughly().tune is None


@pytest.mark.parametrize(
    ("tuned", "before", "expected"),
    [
        ([1.0001, -3.0], [1.0, 2.0], [1.0, -3.0]),
        ([1.0001, -3.0], [1.0, 0.1], [1.0001, -3.0]),  # 0.1 is not in float16
        ([1.0001, 70_000.0], [1.0, 2.0], [1.0001, 70_000.0]),  # nor are 70,000
        ([1.0001, 1e-9], [1.0, 2.0], [1.0001, 1e-9]),  # nor is a scale above 0 that is so small
    ],
)
def test_numbers_are_in_float16_where_they_were_and_can_be(tuned, before, expected):
    found = _as_precise(torch.tensor(tuned), torch.tensor(before), 2.0**-24 if 1e-9 in tuned else -float("inf"))
    assert torch.equal(found, torch.tensor(expected))


def test_a_loss_that_is_not_finite_is_refused_in_one_line():
    model = network()
    quantized = quantize(model, [images()], 2)
    for batch_size in (16, 96):  # 96: seen only after the last step
        with pytest.raises(UserError, match=DIVERGED):
            tuned(model, quantized, Tuning(images=96, epochs=1, learning_rate=1e6, batch_size=batch_size))


class WithoutGradients(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, CLASSES)

    def forward(self, images):
        return self.last(self.conv(images).mean((2, 3))).detach()


def test_a_network_without_gradients_is_refused_in_one_line():
    model = network(WithoutGradients)
    with pytest.raises(UserError, match=r"^quantizer.tune: found a network without gradients .*; accepted: null$"):
        tuned(model, quantize(model, [images()], 4))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"images": 0}, "quantizer.tune.images: found 0; accepted: a whole number of at least 1"),
        ({"epochs": 0}, "quantizer.tune.epochs: found 0; accepted: a whole number of at least 1"),
        ({"batch_size": 1.5}, "quantizer.tune.batch_size: found 1.5; accepted: a whole number of at least 1"),
        ({"learning_rate": 0}, "quantizer.tune.learning_rate: found 0; accepted: a number greater than 0"),
        ({"seed": -1}, "quantizer.tune.seed: found -1; accepted"),
        ({"rate": 1}, "quantizer.tune.rate: found an unknown key; accepted: images, epochs, learning_rate"),
        (5, "quantizer.tune: found 5; accepted: a mapping of keys to values"),
    ],
)
def test_what_is_no_tuning_is_refused(node, message):
    with pytest.raises(UserError) as refusal:
        build({"bits": [2], "tune": node}, "quantizer", Quantizer)
    assert str(refusal.value).startswith(message)


def test_yaml_builds_it_or_none():
    built = [build({"bits": [2], "tune": node}, "quantizer", Quantizer).tune for node in (None, {}, {"images": "1e3"})]
    assert built == [None, Tuning(), Tuning(images=1000)]
