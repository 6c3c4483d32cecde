"""`compress.quantize` and `compress.load`: networks of the user's own, quantized, saved and read back."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import compress
from compress import models
from compress.errors import UserError
from compress.export.description import NetworkDescription
from compress.export.formats import exporter_of
from compress.export.packed import SAID, file_bytes, write_float
from compress.models.canonical import difference
from compress.models.outputs import logits
from compress.pipeline.own_module import _is_as_its_file_says
from tests.models.odd_networks import (
    CLASSES,
    EVERY,
    SHAPE,
    Aliased,
    Attention,
    CalledAgain,
    Computed,
    Named,
    Pair,
    TiedWeights,
    make,
)

NAMES = ["ant", "bee", "cat", "dog"]


def images(count=32, seed=1):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def one_line(mistake):
    assert len(str(mistake.value).splitlines()) == 1
    return str(mistake.value)


@pytest.mark.parametrize("network", EVERY)
def test_what_is_loaded_is_bit_for_bit_what_was_saved(network, tmp_path):
    model = make(network)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantized = compress.quantize(model, images(), bits=8)
    path = tmp_path / "net.safetensors"
    assert quantized.save(path, class_names=NAMES, mean=[0.5], standard_deviation=[0.2]) == path.stat().st_size
    fresh = network()
    kept = {name: value.clone() for name, value in fresh.state_dict().items()}
    loaded, about = compress.load(path, network=fresh)
    with torch.no_grad():
        assert torch.equal(loaded(images(8, 2)), quantized.network(images(8, 2)))
        assert difference(loaded(images(8, 2)), logits(model(images(8, 2)))) < 0.05
    assert (about["class_names"], about["mean"], about["standard_deviation"]) == (NAMES, [0.5], [0.2])
    assert about["format"] == "compress-packed-2"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, kept[name]) for name, value in fresh.state_dict().items())
    lines = [line.split() for line in quantized.table().splitlines()]
    assert [name for name, *_ in lines[1:-1]] == list(quantized.quantized.layers)
    assert lines[-1] == ["file", f"{quantized.save(path):,}"]


@pytest.mark.parametrize("network", [Attention, Computed, Named, TiedWeights])
def test_an_onnx_file_computes_what_the_quantized_network_does(network, tmp_path):
    quantized = compress.quantize(make(network), images(), bits=8)
    quantized.export(tmp_path / "net.onnx")
    model, _ = compress.load(tmp_path / "net.onnx")
    with torch.no_grad():
        assert difference(model(images(8, 2)), quantized.network(images(8, 2))) < 1e-3


class Scored(Named):
    """Features and logits, whose order and names say nothing."""

    def __init__(self, returned):
        super().__init__()
        self.returned = returned

    def forward(self, images):
        hidden = self.stem(images).relu().mean((2, 3))
        return self.returned(hidden, self.head(hidden))


@pytest.mark.parametrize(
    "returned",
    [
        lambda features, scores: (features, scores),
        lambda features, scores: (scores, features),
        lambda features, scores: {"embedding": features, "scores": [scores]},
    ],
)
def test_features_that_logits_are_computed_from_do_not_count_as_logits(returned, tmp_path):
    model = make(lambda: Scored(returned))
    quantized = compress.quantize(model, images(), bits=8)
    with torch.no_grad():
        expected = model.head(model.stem(images(8, 2)).relu().mean((2, 3)))
    assert list(quantized.quantized.layers) == ["stem", "head"]
    assert difference(quantized.network(images(8, 2)), expected) < 1e-2
    quantized.save(tmp_path / "net.safetensors", class_names=NAMES)
    loaded, _ = compress.load(tmp_path / "net.safetensors", network=Scored(returned))
    assert torch.equal(loaded(images(8, 2)), quantized.network(images(8, 2)))


@pytest.mark.parametrize(
    "returned",
    [lambda features, scores: (scores, 2 * features), lambda features, scores: (scores, scores.tanh(), features)],
)
def test_outputs_any_of_which_could_be_logits_are_refused_in_one_line(returned):
    with pytest.raises(
        UserError, match=r"^network: found a network that returns a tuple of .*accepted: logits"
    ) as found:
        compress.quantize(make(lambda: Scored(returned)), images())
    one_line(found)


def test_a_class_stands_for_its_network(tmp_path):
    quantized = compress.quantize(make(Pair), images())
    quantized.save(tmp_path / "net.safetensors")
    loaded, about = compress.load(tmp_path / "net.safetensors", network=Pair)
    assert torch.equal(loaded(images(4)), quantized.network(images(4)))
    assert about["class_names"] == ["0", "1", "2", "3"]
    assert about["architecture"]["options"]["target"] == "tests.models.odd_networks.Pair"


def test_a_file_without_its_class_says_which_it_wants_and_imports_nothing(tmp_path, monkeypatch):
    compress.quantize(make(Pair), images()).save(tmp_path / "net.safetensors")
    monkeypatch.delitem(sys.modules, "tests.models.odd_networks")
    with pytest.raises(UserError) as mistake:
        compress.load(tmp_path / "net.safetensors")
    assert "tests.models.odd_networks.Pair" in one_line(mistake)
    assert "network=" in str(mistake.value)
    assert "tests.models.odd_networks" not in sys.modules


def test_a_network_with_other_tensors_is_refused_in_one_line(tmp_path):
    compress.quantize(make(Aliased), images()).save(tmp_path / "net.safetensors")
    for other in (Pair(), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(432, CLASSES)), CalledAgain):
        with pytest.raises(UserError) as mistake:
            compress.load(tmp_path / "net.safetensors", network=other)
        assert one_line(mistake).startswith(f"{tmp_path / 'net.safetensors'}: ")


def test_images_come_as_a_tensor_in_batches_or_from_a_loader():
    model, pictures = make(CalledAgain), images(40)
    labelled = DataLoader(TensorDataset(pictures, torch.zeros(40)), batch_size=7)
    first = [pictures[:32], ((part, 0) for part in pictures.split(9)), labelled]
    spread = [pictures, pictures.split(16), [(part, 0) for part in pictures.split(9)], images(40)]
    for ways in (first, spread):
        found = [compress.quantize(model, way, bits=3, calibration_images=32) for way in ways]
        assert all(torch.equal(one.images, found[0].images) for one in found)
        assert all(torch.equal(one.network(images(4, 2)), found[0].network(images(4, 2))) for one in found)
        assert len(found[0].images) == 32
    assert torch.equal(compress.quantize(model, pictures.split(7)).images, pictures)


@pytest.mark.parametrize("classes", [torch.arange(100) // 10, torch.arange(100) % 10], ids=["sorted", "in turn"])
def test_images_of_all_classes_calibrate_whatever_their_order(classes):
    """Each image holds the number of its class; ten of a hundred, ten of each class, cannot be of one or of two."""
    pictures = images(100)
    pictures[:, 0, 0, 0] = classes
    for whole in (pictures, pictures.split(16)):
        seen = compress.quantize(make(CalledAgain), whole, calibration_images=10).images[:, 0, 0, 0]
        assert len(seen) == 10
        assert len(seen.unique()) > 4


def test_tuning_sees_more_images_than_the_walk():
    model, pictures = make(CalledAgain), images(48)
    keys = {"rates": 2, "calibration_images": 16}
    for wrap in (lambda some: some.split(10), lambda some: iter(some.split(10))):
        plain = compress.quantize(model, wrap(pictures), **keys)
        tuned, again = (
            compress.quantize(model, wrap(pictures), **keys, tune={"images": 32, "batch_size": 8}) for _ in range(2)
        )
        assert torch.equal(tuned.images, plain.images)
        size, before = (file_bytes(each.quantized, plain.description) for each in (tuned, plain))
        assert size == before
        for name, layer in tuned.quantized.layers.items():
            assert torch.equal(layer.codes, plain.quantized.layers[name].codes)
        assert torch.equal(tuned.network(images(4)), again.network(images(4)))
        assert not torch.equal(tuned.network(images(4)), plain.network(images(4)))
    fewer = compress.quantize(model, iter([pictures[:32]]), **keys, tune={"images": 32, "batch_size": 8})
    assert torch.equal(fewer.network(images(4)), tuned.network(images(4)))


def test_keys_of_the_quantizer_are_given_by_name_nested_or_with_dots():
    model = make(CalledAgain)
    nested = compress.quantize(model, images(), bits=2, first_last_bits=None, grid={"alphabet": "published"})
    dotted = compress.quantize(model, images(), bits=2, first_last_bits=None, **{"grid.alphabet": "published"})
    assert {layer.grid.levels for layer in nested.quantized.layers.values()} == {5}
    assert torch.equal(nested.network(images(4)), dotted.network(images(4)))
    rounded = compress.quantize(model, images(), bits=2, quantizer="rtn", skip=["head"])
    assert (rounded.quantizer.name, "head" in rounded.quantized.layers) == ("rtn", False)


def test_a_rate_and_a_budget_are_kept(tmp_path):
    model = make(CalledAgain)
    at_rate = compress.quantize(model, images(), rates=3)
    assert at_rate.quantized.rate == pytest.approx(3, rel=0.1)
    size = at_rate.save(tmp_path / "a.safetensors")
    within = compress.quantize(model, images(), budget=size)
    assert within.save(tmp_path / "b.safetensors") <= size


def test_a_budget_counts_what_the_file_says_or_the_file_is_refused(tmp_path):
    model, path = make(CalledAgain), tmp_path / "net.safetensors"
    about = {"class_names": [f"{name} {'of a long name ' * 9}{name}" for name in NAMES], "mean": [0.123456789]}
    about["standard_deviation"] = [0.987654321]
    size = compress.quantize(model, images(), rates=3).save(path)
    path.unlink()
    blind = compress.quantize(model, images(), budget=size)
    over = file_bytes(blind.quantized, replace(blind.description, **about)) - size
    assert over > 0
    with pytest.raises(UserError) as mistake:
        blind.save(path, **about)
    assert f"net.safetensors: found a file {over:,} bytes over the budget of {size:,}; accepted: " in one_line(mistake)
    assert not path.exists()
    assert blind.export(tmp_path / "net.onnx", **about) > size
    seeing = compress.quantize(model, images(), budget=size, **about)
    assert seeing.save(path) <= size
    _, read = compress.load(path, network=CalledAgain)
    assert {key: read[key] for key in about} == about
    assert seeing.quantized.rate < blind.quantized.rate
    assert blind.save(path) <= size


def test_the_table_has_a_line_for_each_layer_and_the_share_that_stayed_float():
    lines = compress.quantize(make(Attention), images(), skip=["head"]).table().splitlines()
    assert lines[0].split() == ["layer", "bits", "error", "bytes"]
    assert lines[1].split()[:2] == ["patch", "8"]
    assert float(lines[1].split()[2]) < 0.1
    assert "% of the weights stayed float: " in lines[-1]
    assert "head skip: head" in lines[-1]
    assert "stayed float" not in compress.quantize(make(CalledAgain), images()).table()


def test_it_is_exported_by_suffix_or_name(tmp_path):
    quantized = compress.quantize(make(Aliased), images(), bits=8)
    assert quantized.export(tmp_path / "net.onnx", class_names=NAMES) == (tmp_path / "net.onnx").stat().st_size
    assert quantized.export(tmp_path / "by_name.onnx", format="onnx") > 0
    assert quantized.export(tmp_path / "net.safetensors") == quantized.save(tmp_path / "saved.safetensors")
    model, about = compress.load(tmp_path / "net.onnx")
    assert about["class_names"] == NAMES
    with torch.no_grad():
        assert difference(model(images(8)), quantized.network(images(8))) < 1e-3
    assert exporter_of(tmp_path / "net.onnx").runtime == "onnxruntime"


def test_a_layer_that_not_even_sixteen_bits_can_hold_is_named():
    model, dark = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(432, CLASSES)), images()
    dark[:, 0] = 0
    with torch.no_grad():
        model[1].weight[:, 0] = 1e7
    with pytest.raises(UserError, match=r"^1: found logits .* rounded to 16 bits"):
        compress.quantize(model, dark, bits=8)


MISTAKES = [
    ({"quantizer": "gpqf"}, "quantizer: found 'gpqf'; accepted: "),
    ({"quantizer": "none"}, "quantizer: found none"),
    ({"sweeps": 3}, "quantizer.sweeps: found an unknown key; accepted: "),
    ({"refinement": {"sweep": 3}}, "quantizer.refinement.sweep: found an unknown key; accepted: "),
    ({"refinement.sweeps": -1}, "quantizer.refinement.sweeps: found -1; accepted: "),
    ({"bits": 1}, "quantizer.bits: found "),
    ({"bits": [2, 4]}, "bits: found [2, 4] and the rates []; accepted: one width, one of rates, or budget=SIZE"),
    ({"bits": 2, "rates": 2}, "bits: found [2] and the rates [2.0]; accepted: one width"),
    ({"max_drop": 1.0}, "quantizer.max_drop: found it without labelled images"),
    ({"skip": ["body"]}, "skip: found 'body', which matches no layer"),
    ({"images": images()[0]}, "images: found torch.float32 (3, 12, 12); accepted: images (N, C, H, W)"),
    ({"images": (images() * 255).byte()}, "images: found torch.uint8"),
    ({"images": []}, "images: found none"),
    ({"images": 3}, "images: found a int"),
    ({"images": images()[:, :1]}, "found a forward that fails for images (1, 12, 12)"),
    ({"network": "resnet18"}, "network: found a str; accepted: a torch.nn.Module"),
    ({"class_names": ["a"]}, "class_names: found ['a']; accepted: 4 different names"),
    ({"mean": [0.5]}, "mean: found only one of mean and standard_deviation"),
]


@pytest.mark.parametrize(("changed", "message"), MISTAKES)
def test_a_mistake_is_one_line(changed, message):
    with pytest.raises(UserError) as mistake:
        compress.quantize(**{"network": make(CalledAgain), "images": images()} | changed)
    assert message in one_line(mistake)


SAVING = [
    ({"class_names": ["a"]}, "class_names: found ['a']; accepted: 4 different names"),
    ({"class_names": ["a", "b", "c", "a"]}, "class_names: found ['a', 'b', 'c', 'a']; accepted: 4 different names"),
    ({"class_names": "abcd"}, "class_names: found 'abcd'"),
    ({"mean": [0.5]}, "mean: found only one of mean and standard_deviation"),
    ({"mean": [0.5, 0.5], "standard_deviation": [1.0]}, "mean: found [0.5, 0.5]; accepted: 1 or 3 numbers"),
    ({"mean": [0.5], "standard_deviation": [0.0]}, "standard_deviation: found [0.0]; accepted: numbers greater"),
    ({"format": "zip"}, "format: found 'zip'; accepted: executorch, litert, onnx, openvino, packed"),
    ({"format": "onnx"}, "found another suffix than that of onnx; accepted: .onnx"),
]


def test_a_mistake_in_what_a_file_says_is_one_line_and_writes_nothing(tmp_path):
    quantized = compress.quantize(make(CalledAgain), images())
    for keywords, message in SAVING:
        with pytest.raises(UserError) as mistake:
            quantized.export(tmp_path / "net.safetensors", **keywords)
        assert message in one_line(mistake)
    with pytest.raises(
        UserError,
        match=r"net\.bin: found no suffix .*; accepted: \.onnx or \.openvino\.onnx or \.pte or \.safetensors or "
        r"\.tflite",
    ):
        quantized.export(tmp_path / "net.bin")
    assert list(Path(tmp_path).iterdir()) == []


class TestNetworkFromAFile:
    @pytest.fixture
    def read(self, tmp_path):
        """A network that was read from a float32 file."""
        torch.manual_seed(0)
        architecture = {"stem": "resnet8_narrow", "options": {}, "num_classes": CLASSES}
        description = NetworkDescription(architecture, NAMES, [0.5], [0.2], SHAPE)
        write_float(tmp_path / "float.safetensors", models.build("resnet8_narrow", CLASSES), description)
        return compress.load(tmp_path / "float.safetensors")[0]

    def test_what_its_file_said_is_in_the_next_one(self, read, tmp_path):
        quantized = compress.quantize(read, images(), bits=8)
        quantized.save(tmp_path / "small.safetensors")
        again, about = compress.load(tmp_path / "small.safetensors")
        assert (about["class_names"], about["mean"], about["standard_deviation"]) == (NAMES, [0.5], [0.2])
        with torch.no_grad():
            assert torch.equal(again(images(8, 2)), quantized.network(images(8, 2)))
        compress.quantize(read, images(), bits=8, class_names=NAMES[::-1]).save(tmp_path / "other.safetensors")
        assert compress.load(tmp_path / "other.safetensors")[1]["class_names"] == NAMES[::-1]

    def test_a_network_that_was_changed_is_one_of_the_users_own(self, read, tmp_path):
        hook = read.conv1.register_forward_hook(lambda module, inputs, output: 2 * output + 1)
        assert not _is_as_its_file_says(read, getattr(read, SAID)["architecture"], images(2))
        hook.remove()
        assert _is_as_its_file_says(read, getattr(read, SAID)["architecture"], images(2))
        [name] = [name for name, module in read.named_modules() if isinstance(module, torch.nn.Linear)]
        setattr(read, name, torch.nn.Linear(read.get_submodule(name).in_features, 3))
        assert not _is_as_its_file_says(read, getattr(read, SAID)["architecture"], images(2))
