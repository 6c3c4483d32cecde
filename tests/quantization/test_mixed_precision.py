"""Widths by layer: the program is optimal, a budget holds for the file, a drop for the validation accuracy."""

import itertools

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.nn import functional as F

from compress import models
from compress.arguments import build
from compress.errors import UserError
from compress.export.description import NetworkDescription
from compress.export.encodings import layer_bytes
from compress.export.packed import file_bytes, read_model, write_packed
from compress.paths import CONF
from compress.quantization import Correction, Measures, Options
from compress.quantization.allocation import allocate
from compress.quantization.mixed_precision import budget_bytes
from compress.quantization.sensitivity import measure_sensitivities

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
    return [torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))]


def quantizer(**options):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("quantizer/gpfq").quantizer
    # The searched and refitted scales take most of the time, and what is tested here does not depend on them.
    node.refinement = {}
    node.update(options)
    return build(node, "quantizer")


def measures(accuracy=lambda model: 1.0):
    return Measures(lambda each: file_bytes(each, DESCRIPTION), layer_bytes, accuracy, 319_288)


def only(quantizer, network, images, measured):
    [variant] = quantizer.variants(network, images, measured, lambda *done: None)
    return variant


@pytest.mark.parametrize("seed", range(5))
def test_the_allocation_is_the_best_of_all(seed):
    draws = torch.Generator().manual_seed(seed)
    costs = [torch.rand(3, generator=draws).tolist() for _ in range(5)]
    sizes = [torch.randint(1, 9000, (3,), generator=draws).tolist() for _ in range(5)]
    for budget in range(sum(map(min, sizes)), sum(map(max, sizes)), 3000):
        chosen = allocate(costs, sizes, budget)
        assert sum(own[index] for own, index in zip(sizes, chosen, strict=True)) <= budget
        best = min(
            sum(own[index] for own, index in zip(costs, choice, strict=True))
            for choice in itertools.product(range(3), repeat=5)
            if sum(own[index] for own, index in zip(sizes, choice, strict=True)) <= budget
        )
        assert sum(own[index] for own, index in zip(costs, chosen, strict=True)) == pytest.approx(best, abs=1e-9)


def test_a_budget_below_the_smallest_choices_has_no_allocation():
    assert allocate([[1.0, 0.0], [0.0]], [[10, 20], [5]], 14) is None
    assert allocate([[1.0, 0.0], [0.0]], [[10, 20], [5]], 15) == [0, 0]


def test_the_sensitivity_is_the_divergence_with_one_layer_quantized(network, images):
    options = Options(correction=Correction(bias=False))
    choices = measure_sensitivities(network, images, [2, 4], options, images=32)
    assert list(choices.answers["conv1"]) == list(choices.answers["fc"]) == [8]
    name = "layer2.0.conv1"
    analog = choices.prepared.analog
    with torch.no_grad():
        reference = analog(images[0]).double().log_softmax(1)
        answer, _ = choices.answers[name][2]
        layer = analog.get_submodule(name)
        kept = layer.weight.clone()
        layer.weight.copy_(answer.grid.dequantize(answer.codes))
        changed = analog(images[0]).double().log_softmax(1)
        layer.weight.copy_(kept)
    expected = (reference.exp() * (reference - changed)).sum(1).mean().item()
    assert choices.divergence[name][2] == pytest.approx(expected, rel=1e-4)
    assert choices.divergence[name][2] > choices.divergence[name][4] > 0
    with torch.no_grad():
        assert torch.equal(analog(images[0]).double().log_softmax(1), reference), "the layers are put back"


@pytest.mark.slow
@pytest.mark.parametrize("budget", [33_000, 40_001, "8.5x"])
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_the_written_file_is_within_the_budget_and_close_to_it(network, images, tmp_path, budget, activation_bits):
    chosen = quantizer(bits=[2, 3, 4, 8], budget=budget, activation_bits=activation_bits)
    variant = only(chosen, network, images, measures())
    path = tmp_path / "mixed.safetensors"
    write_packed(path, variant.model, DESCRIPTION)
    allowed = budget_bytes(budget, 319_288)
    assert 0.93 * allowed < path.stat().st_size <= allowed
    widths = {name: layer.bits for name, layer in variant.model.layers.items()}
    assert widths["conv1"] == widths["fc"] == 8
    assert len(set(widths.values())) > 2
    model, about = read_model(path)
    assert {layer["name"]: layer["bits"] for layer in about["layers"]} == widths
    with torch.no_grad():
        assert torch.equal(model(images[0]), variant.model.model(images[0]))
    inner = {name: layer for name, layer in variant.model.layers.items() if name not in ("conv1", "fc")}
    weights = sum(layer.codes.numel() for layer in inner.values())
    mean = sum(layer.bits * layer.codes.numel() for layer in inner.values()) / weights
    assert variant.bits == pytest.approx(mean)


@pytest.mark.slow
def test_mixed_precision_is_closer_to_the_float_network_than_one_width_of_the_same_size(network, images):
    [uniform] = quantizer(bits=[3]).variants(network, images, measures(), lambda *done: None)
    size = file_bytes(uniform.model, DESCRIPTION)
    mixed = only(quantizer(bits=[2, 3, 4, 5, 6], budget=size), network, images, measures())
    assert file_bytes(mixed.model, DESCRIPTION) <= size

    def distance(model):
        with torch.no_grad():
            pair = [each(images[0]).log_softmax(1) for each in (model, network)]
        return F.kl_div(*pair, reduction="batchmean", log_target=True).item()

    assert distance(mixed.model.model) < distance(uniform.model.model)


def test_a_budget_that_nothing_meets_names_the_smallest_file(network, images):
    with pytest.raises(UserError, match=r"quantizer.budget: found 20,000 bytes, .* has 22,\d\d\d; accepted"):
        only(quantizer(bits=[2, 4], budget="20kB"), network, images, measures())


@pytest.mark.slow
def test_the_smallest_file_within_the_drop_is_found(network, images):
    def accuracy(model: nn.Module) -> float:
        # Falls with the distance from the float network, so that more bytes are better.
        with torch.no_grad():
            logits = network(images[0])
            return 1 - ((model(images[0]) - logits).norm() / logits.norm()).item()

    exact = only(quantizer(bits=[2, 3, 4, 8], max_drop=100), network, images, measures(accuracy))
    assert {layer.bits for layer in exact.model.layers.values()} == {2, 8}
    strict = only(quantizer(bits=[2, 3, 4, 8], max_drop=2), network, images, measures(accuracy))
    assert accuracy(strict.model.model) >= 0.98
    size = file_bytes(strict.model, DESCRIPTION)
    assert file_bytes(exact.model, DESCRIPTION) < size
    # What has a twentieth fewer bytes loses more, on any machine: it was measured.
    smaller = only(quantizer(bits=[2, 3, 4, 8], budget=int(0.95 * size)), network, images, measures(accuracy))
    assert accuracy(smaller.model.model) < 0.98
    with pytest.raises(UserError, match=r"max_drop: found 0.1, but the largest widths .* lose \d+\.\d\d points"):
        only(quantizer(bits=[2, 3], max_drop=0.1), network, images, measures(accuracy))


@pytest.mark.slow
def test_a_smaller_file_is_found_although_larger_ones_lose_more(network, images):
    kept, measured = (2.3, 2.7), []

    def accuracy(model: nn.Module) -> float:
        # As if the mean widths of an interval happened to keep the drop, and of the wider ones only the widest.
        if model is network:
            return 1.0
        inner = [layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d) and name != "conv1"]
        width = sum(bits_of(layer) * layer.weight.numel() for layer in inner)
        measured.append(width / sum(layer.weight.numel() for layer in inner))
        return 1.0 if kept[0] <= measured[-1] <= kept[1] or measured[-1] > 3.9 else 0.5

    variant = only(quantizer(bits=[2, 3, 4], max_drop=10), network, images, measures(accuracy))
    assert kept[0] <= variant.bits <= kept[1]
    assert variant.bits == pytest.approx(min(width for width in measured if width >= kept[0]))
    # From the smallest file on, no step is longer than a twentieth of the widest file.
    climbed = sorted(width for width in measured if width <= variant.bits)
    assert climbed[0] == 2
    assert max(wider - narrower for narrower, wider in itertools.pairwise(climbed)) < 0.25
    smaller = only(
        quantizer(bits=[2, 3, 4], budget=int(0.95 * file_bytes(variant.model, DESCRIPTION))),
        network,
        images,
        measures(),
    )
    assert accuracy(smaller.model.model) < 0.9


def bits_of(layer: nn.Conv2d) -> int:
    """The width of a quantized layer, by how many values the weights of a channel have."""
    return max((len(row.unique()) - 1).bit_length() for row in layer.weight.detach().flatten(1))


@pytest.mark.slow
def test_layers_that_grow_together_are_too_small_a_budget_and_no_mistake(network, images):
    # As if codes had been smaller where each layer was answered alone.
    grown = []

    def size(each):
        return file_bytes(each, DESCRIPTION) + 100 * any(each is other for other in grown)

    measured = Measures(size, layer_bytes, lambda model: 1.0, 319_288)
    options = {"bits": [2, 4]}
    built = quantizer(**options, max_drop=50)
    found = built.sensitivities(network, images)
    low = size(found.model(found.smallest()))
    own = type(built).__call__

    def growing(self, *arguments):
        grown.append(own(self, *arguments))
        return grown[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(built), "__call__", growing)
        variant = only(built, network, images, measured)
        assert size(variant.model) > low
        with pytest.raises(UserError, match=f"found {low:,} bytes, .* has [0-9,]+; accepted"):
            only(quantizer(**options, budget=low), network, images, measured)


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


def test_a_budget_and_a_drop_exclude_each_other():
    with pytest.raises(UserError, match=r"^quantizer[.]max_drop: found it beside budget; accepted"):
        quantizer(budget="8x", max_drop=1)
