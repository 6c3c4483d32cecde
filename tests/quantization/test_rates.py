"""Networks of a rate: the bits are those asked for, a budget holds for the file, a drop for the validation accuracy."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from compress import models
from compress.arguments import build
from compress.errors import UserError
from compress.export.description import NetworkDescription
from compress.export.encodings import coded_bits
from compress.export.packed import file_bytes, read_model, write_packed
from compress.paths import CONF
from compress.quantization import Measures, Quantizer
from compress.quantization.activations import input_quantizers
from compress.quantization.logit_sensitivity import TEMPERATURE, LayerSensitivity, _squared_gradients, _Sums, measure
from compress.quantization.preparation import prepare
from compress.quantization.rate_search import ENOUGH, budget_bytes, smallest_within_drop
from compress.quantization.rates import DRIFT, PRICES, SPARED, RateControl

FLOAT_BYTES = 319_288
DESCRIPTION = NetworkDescription(
    architecture={"stem": "resnet8", "options": {}, "num_classes": 10},
    class_names=list("0123456789"),
    mean=[0.5] * 3,
    standard_deviation=[0.25] * 3,
    input_shape=[3, 8, 8],
)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return models.build("resnet8", 10).eval()


@pytest.fixture(scope="module")
def images():
    return [torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))]


def quantizer(stem="gpfq", **options):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose(f"quantizer/{stem}").quantizer
    return build(OmegaConf.merge(node, {"bits": []} | options), "quantizer")


COUPLED = [{}, {"coupled_rows": True}]


def measures(accuracy=lambda model: 1.0):
    return Measures(lambda each: file_bytes(each, DESCRIPTION), FLOAT_BYTES, accuracy)


def variants(quantizer, network, images, measured=None):
    return list(quantizer.variants(network, images, measured or measures(), lambda *done: None))


def distance(model, network, images):
    with torch.no_grad():
        pair = [each(images[0]).log_softmax(1) for each in (model, network)]
    return F.kl_div(*pair, reduction="batchmean", log_target=True).item()


@pytest.mark.parametrize("name", ["conv1", "layer1.0.conv2", "layer3.0.conv1", "fc"])
def test_the_divergence_of_a_small_error_is_the_one_that_was_measured(network, images, name):
    prepared = prepare(network, images)
    sensitivity = measure(prepared)[name]
    layer = prepared.analog.get_submodule(name)
    outputs = []
    layer.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    with torch.no_grad():
        reference = (prepared.analog(images[0]) / TEMPERATURE).double().log_softmax(1)
        expected = found = 0.0
        for seed in range(8):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            layer.weight, layer.bias = nn.Parameter(weight + 0.05 * weight.std() * noise), nn.Parameter(bias)
            prepared.analog(images[0])
            # What moves all outputs of a channel alike is corrected in the bias, as quantization does.
            moved = (outputs[-1] - outputs[0]).movedim(1, 0).flatten(1).mean(1)
            layer.bias = nn.Parameter(bias - moved)
            changed = (prepared.analog(images[0]) / TEMPERATURE).double().log_softmax(1)
            found += F.kl_div(changed, reference, reduction="sum", log_target=True).item()
            expected += sensitivity.curvature * float((outputs[-1] - outputs[0]).square().sum())
    # Drawn classes and few images: a factor, not digits.
    assert expected == pytest.approx(found, rel=0.5)


@pytest.mark.parametrize(("rows", "columns", "places"), [(40, 30, 2), (40, 30, 1), (3, 4, 50)])
def test_squared_gradients_are_those_of_each_images_weight(rows, columns, places):
    draws = torch.Generator().manual_seed(0)
    slopes = torch.randn(5, 2, rows, places, generator=draws, dtype=torch.float64)
    inputs = torch.randn(2, columns, 5, places, generator=draws, dtype=torch.float64)
    expected = sum(
        float((slopes[image, group] @ inputs[group, :, image].T).square().sum())
        for image in range(5)
        for group in range(2)
    )
    assert _squared_gradients(slopes, inputs) == pytest.approx(expected, rel=1e-9)


def test_inputs_whose_patches_overlap_in_memory_are_centred():
    draws = torch.Generator().manual_seed(0)
    inputs, gradient = torch.randn(1, 1, 20, generator=draws), torch.randn(1, 4, 18, generator=draws)
    windows = inputs[0, 0].unfold(0, 3, 1).double()
    centred = windows - windows.mean(0)
    layer, found = nn.Conv1d(1, 4, 3, bias=False), _Sums()
    found.add(layer, inputs.clone(), layer(inputs).detach(), gradient)
    assert found.input_energy == pytest.approx(float(centred.square().sum()) / 3, rel=1e-5)
    expected = float((gradient[0].double() @ centred).square().sum())
    assert found.squared_gradients == pytest.approx(expected, rel=1e-5)


def test_sensitivities_do_not_depend_on_the_unit_of_outputs(images):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()
    scaled = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in scaled[0].parameters():
            parameter.mul_(1024)
        scaled[3].weight.div_(1024)
    found = [measure(prepare(each, images)) for each in (plain, scaled)]
    for name in found[0]:
        assert found[0][name].divergence == pytest.approx(found[1][name].divergence, rel=1e-6)
    assert found[0]["0"].curvature == pytest.approx(1024**2 * found[1]["0"].curvature, rel=1e-6)


@pytest.mark.parametrize("refinement", COUPLED)
def test_a_network_that_is_certain_of_every_image_has_rates(network, images, refinement):
    certain = copy.deepcopy(network)
    with torch.no_grad():
        certain.fc.weight.mul_(1e4)
        certain.fc.bias.mul_(1e4)
    [found] = variants(quantizer(rates=[3], refinement=refinement), certain, images)
    assert found.model.rate == pytest.approx(3, rel=0.02)
    with torch.no_grad():
        expected, computed = certain(images[0]), found.model.model(images[0])
    assert (computed - expected).norm() < 0.1 * expected.norm()


class Dead(nn.Module):
    """A layer whose inputs are all the same, zero or not, or whose weights are zero, in a network of small numbers."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.first = kind, nn.Conv2d(3, 16, 3)
        self.dead, self.last = nn.Conv2d(16, 16, 3, padding=1, padding_mode="replicate"), nn.Linear(16, 10)
        if kind == "weights":
            nn.init.zeros_(self.dead.weight)

    def forward(self, images):
        x = F.relu(self.first(1e-3 * images))
        constant = x if self.kind == "weights" else 0 * x if self.kind == "zero" else 0 * x + 0.7
        return self.last((x + self.dead(constant)).mean((2, 3)))


@pytest.mark.parametrize("refinement", COUPLED)
@pytest.mark.parametrize(("kind", "rate"), [("zero", 2.0), ("constant", 2.0), ("weights", 0.5)])
def test_a_layer_that_has_nothing_to_say_spends_little(images, kind, rate, refinement):
    torch.manual_seed(0)
    dead = Dead(kind).eval()
    [found] = variants(quantizer(rates=[rate], refinement=refinement), dead, images)
    assert found.model.rate == pytest.approx(rate, rel=0.05)
    assert found.model.layers["dead"].bits < found.model.layers["first"].bits
    with torch.no_grad():
        expected, computed = dead(images[0]), found.model.model(images[0])
    assert (computed - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("refinement", COUPLED)
def test_rates_are_met_and_the_step_is_one(network, images, refinement):
    found = variants(quantizer(rates=[3, 1.5], refinement=refinement), network, images)
    assert [variant.label for variant in found] == ["3.0 bits/weight", "1.5 bits/weight"]
    assert [variant.word for variant in found] == ["3.0bpw", "1.5bpw"]
    for variant in found:
        weights = sum(layer.codes.numel() for layer in variant.model.layers.values())
        assert variant.model.rate == pytest.approx(variant.bits, rel=0.02)
        assert coded_bits(variant.model) / weights == pytest.approx(variant.bits, rel=0.05)
        for layer in variant.model.layers.values():
            assert len(layer.grid.scale.unique()) == 1
            assert layer.grid.zero_point.unique().tolist() == [layer.grid.levels // 2]
            assert layer.sensitivity > 0
    near, far = (distance(variant.model.model, network, images) for variant in found)
    assert near < far


@pytest.mark.parametrize("options", [{"count": 4}, {"max_rows": 64}])
@pytest.mark.parametrize("rate", [2.0, 1.0])
def test_rates_are_met_with_few_patches(network, images, options, rate):
    batch = images[0][: options.get("count")]
    grams = {"max_rows": options.get("max_rows")}
    found = quantizer(rates=[rate], grams=grams).at_rates(network, [batch])(rate)
    assert found.rate == pytest.approx(rate, rel=0.06)


@pytest.mark.parametrize(("most", "share"), [(None, 1.0), (64, 1.0), (None, 0.25)])
def test_a_rate_is_found_in_few_walks(network, images, most, share):
    at_rate = quantizer(rates=[1.5], grams={"max_rows": most}).at_rates(network, [images[0][: int(64 * share)]])
    rates = [at_rate.walk(1.5).rate for _ in range(3)]
    assert rates[0] == pytest.approx(1.5, rel=0.25)
    assert rates[1] == pytest.approx(1.5, rel=0.1)
    assert rates[2] == pytest.approx(1.5, rel=0.03)


@pytest.mark.parametrize("size", [8, 2])
def test_every_layer_has_about_its_bits_halfway(network, monkeypatch, size):
    # At a size of 2 the last maps have one pixel, which a ninth of the columns of a 3x3 kernel sees.
    halfway, end = {}, {}
    revised_price, spent = RateControl.revised_price, RateControl.spent

    def keep(control, name, bits):
        halfway[name] = bits
        return revised_price(control, name, bits)

    def keep_end(control, name, bits):
        end[name] = bits
        spent(control, name, bits)

    monkeypatch.setattr(RateControl, "revised_price", keep)
    monkeypatch.setattr(RateControl, "spent", keep_end)
    images = torch.randn(128, 3, size, size, generator=torch.Generator().manual_seed(1))
    quantizer(rates=[3.0]).at_rates(network, [images]).walk(3.0)
    assert [*halfway] == [*end]
    assert len(end) == 10
    for name, bits in halfway.items():
        assert bits == pytest.approx(end[name], rel=0.25)


@pytest.fixture
def control():
    draws = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(count, 64, generator=draws) for name, count in (("a", 64), ("b", 256), ("c", 128))}
    energies = {"a": 1.0, "b": 0.3, "c": 2.0}
    return RateControl(weights, {name: LayerSensitivity(1.0, energies[name], 1.0, None) for name in weights})


def bits_at(control, name, price):
    """What the curve of a layer has at a `price`."""
    return float(np.interp(math.log(price, 4), PRICES, control.predicted[name]))


@pytest.mark.parametrize("rate", [3.0, 1.0])
@pytest.mark.parametrize("factor", [0.7, 1.4])
def test_what_is_seen_halfway_is_made_up_for_in_the_same_walk(control, rate, factor):
    # Each layer takes the bits of a price that is `factor` times its own.
    count = sum(64 * rows for rows in (64, 256, 128))
    totals = {}
    for halfway in (True, False):
        control.met.clear()
        control.start(rate * count)
        totals[halfway] = 0.0
        for name in ("a", "b", "c"):
            price = control.price_of(name)
            if halfway:
                price = control.revised_price(name, bits_at(control, name, factor * price))
            taken = bits_at(control, name, factor * price)
            control.spent(name, taken)
            totals[halfway] += taken
    assert totals[True] == pytest.approx(rate * count, rel=0.005)
    assert abs(totals[False] - rate * count) > 0.02 * rate * count


def test_how_much_a_layer_grows_after_halfway_is_learned(control):
    count = sum(64 * rows for rows in (64, 256, 128))
    misses = []
    for _ in range(6):
        control.start(2.0 * count)
        total = 0.0
        for name in ("a", "b", "c"):
            price = control.revised_price(name, 0.8 * bits_at(control, name, control.price_of(name)))
            taken = bits_at(control, name, price)
            control.spent(name, taken)
            total += taken
        misses.append(abs(total / (2.0 * count) - 1))
    assert misses[0] > 0.05
    assert misses[-1] < 0.01


def test_a_price_is_kept_for_a_few_bits(control):
    control.start(20_000)
    price = control.price_of("a")
    few = bits_at(control, "a", price) + 0.5 * SPARED * 20_000
    assert control.revised_price("a", few) == price
    assert control.revised_price("a", few + 0.01 * 20_000) > price


def test_prices_differ_by_no_more_than_drift(control):
    control.start(20_000)
    first = control.price_of("a")
    control.spent("a", 19_000)
    assert control.price_of("b") == pytest.approx(first * DRIFT)


def test_widths_come_before_rates(network, images):
    found = variants(quantizer(bits=[4], rates=[2.5]), network, images)
    assert [(variant.label, variant.levels) for variant in found] == [("4 bit", 16), ("2.5 bits/weight", None)]


@pytest.mark.slow
def test_a_rate_is_closer_to_the_float_network_than_a_width_of_as_many_bytes(network, images):
    [uniform] = variants(quantizer(bits=[3]), network, images)
    size = file_bytes(uniform.model, DESCRIPTION)
    [coded] = variants(quantizer(budget=size), network, images)
    assert file_bytes(coded.model, DESCRIPTION) <= size
    assert distance(coded.model.model, network, images) < distance(uniform.model.model, network, images)


class Odd(nn.Module):
    """Groups, a depthwise convolution, a layer that is called twice, two that share a weight, one that is left out."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.groups = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.again = nn.Conv2d(8, 8, 1)
        self.line = nn.Conv1d(8, 8, 3)
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.one.weight
        self.unread, self.left_out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 10)

    def forward(self, images):
        x = F.relu(self.norm(self.first(images)), inplace=True)
        x = F.relu(self.groups(x)) + self.depthwise(x)
        x = self.again(F.relu(self.again(x)))
        x = self.line(x.flatten(2)).mean(2)
        self.unread(x)
        return self.last(F.relu(self.left_out(F.relu(self.other(self.one(x))))))


@pytest.mark.parametrize("refinement", [*COUPLED, {"coupled_rows": True, "survivors": 2}])
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_whatever_layers_a_network_has(images, activation_bits, refinement):
    torch.manual_seed(0)
    odd = Odd().eval()
    with torch.no_grad():
        odd.groups.weight[:, 0] = 0  # pruned
    options = quantizer(rates=[4.0], skip=["left_out"], activation_bits=activation_bits, refinement=refinement)
    [found] = variants(options, odd, images)
    layers = found.model.layers
    assert layers.keys() == {"first", "groups", "depthwise", "again", "line", "one", "last"} | (
        {"unread"} if "unread" in layers else set()
    )
    assert not layers["groups"].grid.dequantize(layers["groups"].codes)[:, 0].any()
    assert found.model.tied == {"other": "one"}
    assert bool(input_quantizers(found.model.model)) == (activation_bits is not None)
    assert found.model.rate == pytest.approx(4.0, rel=0.05)
    with torch.no_grad():
        expected, computed = odd(images[0]), found.model.model(images[0])
    assert (computed - expected).norm() < 0.2 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("budget", [15_000, 24_000, 40_001, "8.5x"])
def test_the_written_file_is_within_the_budget_and_close_to_it(network, images, tmp_path, budget):
    [variant] = variants(quantizer(budget=budget), network, images)
    path = tmp_path / "budget.safetensors"
    write_packed(path, variant.model, DESCRIPTION)
    allowed = budget_bytes(budget, FLOAT_BYTES)
    assert ENOUGH * allowed <= path.stat().st_size <= allowed
    assert (variant.word, variant.levels) == ("budget", None)
    assert variant.bits == pytest.approx(variant.model.rate, abs=1e-3)
    model, about = read_model(path)
    assert [layer["bits"] for layer in about["layers"]] == pytest.approx(
        [layer.bits for layer in variant.model.layers.values()], abs=0.006
    )
    with torch.no_grad():
        assert torch.equal(model(images[0]), variant.model.model(images[0]))


def test_a_budget_that_nothing_meets_names_the_smallest_file(network, images):
    with pytest.raises(UserError, match=r"quantizer.budget: found 2,000 bytes, .* has \d,\d\d\d; accepted") as refusal:
        variants(quantizer(budget="2kB"), network, images)
    smallest = int(str(refusal.value).split(" has ")[1].split(";")[0].replace(",", ""))
    assert 2_000 < smallest < 5_000
    with pytest.raises(UserError, match=r"quantizer.budget: found 2,000 bytes"):
        quantizer(budget=2000).check_budget(network, images, measures().file_bytes, FLOAT_BYTES)


@pytest.mark.slow
def test_the_highest_rate_answers_a_budget_without_bounds(network, images):
    [variant] = variants(quantizer(budget="10MB"), network, images)
    assert variant.bits == pytest.approx(8, rel=0.1)


@pytest.mark.slow
def test_the_smallest_file_within_the_drop_is_found(network, images):
    tried = []

    def accuracy(model: nn.Module) -> float:
        # Falls with the distance from the float network, so that more bytes are better.
        with torch.no_grad():
            logits = network(images[0])
            tried.append(1 - ((model(images[0]) - logits).norm() / logits.norm()).item())
        return tried[-1]

    [strict] = variants(quantizer(max_drop=2), network, images, measures(accuracy))
    assert strict.word == "drop"
    assert accuracy(strict.model.model) >= 0.98
    # One of a few hundredths fewer bits was tried and lost more.
    assert max(value for value in tried if value < 0.98) > 0.97
    [loose] = variants(quantizer(max_drop=10), network, images, measures(accuracy))
    assert loose.bits < strict.bits
    with pytest.raises(UserError, match=r"max_drop: found 0.0, but 8 bits a weight lose \d+\.\d\d points"):
        variants(quantizer(max_drop=0.0), network, images, measures(accuracy))


@pytest.mark.parametrize(
    ("stem", "options", "message"),
    [
        ("rtn", {"rates": [2]}, r"rates: found \[2.0\] for rtn, which has no rates; accepted: gpfq without thresholds"),
        ("gptq", {"budget": "8x"}, r"budget: found 8x for gptq, which has no rates"),
        ("gpfq", {"rates": [0.01]}, r"rates"),
        ("gpfq", {"rates": [9]}, r"rates"),
        ("gpfq", {"rates": [2, 2]}, r"rates.*every value once"),
        ("gpfq", {"rates": [2], "calibration_images": 1}, r"calibration_images: found 1; accepted for rates"),
        ("gpfq", {"max_drop": 1, "calibration_images": 1}, r"calibration_images: found 1; accepted for rates"),
        (
            "gpfq",
            {"bits": [4], "refinement": COUPLED[1]},
            r"refinement.coupled_rows: found true without a rate; accepted",
        ),
        ("gpfq", {}, r"bits: found \[\] and no rates; accepted: one of either at least"),
        ("gpfq", {"budget": "8x", "max_drop": 1}, r"^quantizer[.]max_drop: found it beside budget; accepted"),
    ],
)
def test_what_does_not_fit_is_refused(stem, options, message):
    with pytest.raises(UserError, match=message):
        quantizer(stem, **options)


def test_rates_have_the_same_names_whether_typed_or_not():
    assert list(map(str, Quantizer().coded_rates)) == list(map(str, Quantizer(rates=[2, 1]).coded_rates))


def test_a_drop_may_be_met_exactly():
    quantized = SimpleNamespace(model="quantized")
    for right in range(1800, 1900):
        accuracy = {"float": right / 2000, "quantized": (right - 5) / 2000}.__getitem__
        assert smallest_within_drop(lambda rate: quantized, "float", 0.25, measures(accuracy)) is quantized


def test_thresholds_have_no_rates():
    solver = {"_target_": "compress.quantization.solvers.GPFQ", "soft_threshold": 0.1}
    with pytest.raises(UserError, match=r"rates: found .*; accepted: gpfq without thresholds"):
        quantizer(rates=[2], solver=solver)


class WithoutGradients(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)

    def forward(self, images):
        return self.last(self.conv(images).mean((2, 3)).detach()).detach()


def test_a_network_without_gradients_is_refused(images):
    with pytest.raises(UserError, match=r"found a network without gradients .*; accepted: .* only quantizer.bits"):
        variants(quantizer(rates=[2]), WithoutGradients().eval(), images)


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("500000", 500_000), (1200, 1200), ("500kB", 500_000), (".5MB", 500_000), ("1 KiB", 1024), ("8x", 12_500)],
)
def test_budgets_are_read(text, bytes_):
    assert budget_bytes(text, 100_000) == bytes_


@pytest.mark.parametrize("text", ["", "half", "-3", "0", "0.5x", "3 qB", "1e6", "0.1B"])
def test_what_is_no_budget_is_said(text):
    with pytest.raises(UserError, match=r"^budget: found .*; accepted: a size such as"):
        budget_bytes(text, 100_000)
