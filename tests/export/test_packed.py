"""Model files: written and read back to the same logits, small, repeatable, and refused when they are not intact."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from compress import models
from compress.errors import UserError
from compress.export import container
from compress.export.bits import packed_length
from compress.export.description import NetworkDescription
from compress.export.packed import read_model, write_float, write_packed
from compress.export.weights import load_weights
from compress.pruning.magnitude import Magnitude
from compress.quantization import quantize


def describe(stem, **options):
    return NetworkDescription(
        architecture={"stem": stem, "options": options, "num_classes": 10},
        class_names=[str(digit) for digit in range(10)],
        mean=[0.5],
        standard_deviation=[0.25],
        input_shape=(3, 8, 8),
    )


def make(stem, **options):
    torch.manual_seed(0)
    model = models.build(stem, 10, **options).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(32, 3, 8, 8))
    return model.eval()


IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def small():
    return make("resnet8")


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        (1, {}),
        (2, {}),
        (2, {"grid": {"alphabet": "published"}, "first_last_bits": None}),
        (3, {"skip": ["*downsample*", "fc"]}),
        (8, {"grid": {"alphabet": "published"}}),
        (16, {"first_last_bits": None}),
    ],
)
def test_the_model_read_back_has_exactly_the_logits_that_were_evaluated(small, bits, options, tmp_path):
    quantized = quantize(small, [IMAGES], bits, **options)
    path = tmp_path / "model.safetensors"
    size = write_packed(path, quantized, replace(describe("resnet8"), extra={"seed": 3}))
    assert size == path.stat().st_size
    model, description = read_model(path)
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(IMAGES), quantized.model(IMAGES))
    assert description["format"] == "compress-packed-1"
    assert description["architecture"] == {"stem": "resnet8", "options": {}, "num_classes": 10}
    assert (description["mean"], description["input_shape"], description["extra"]) == ([0.5], [3, 8, 8], {"seed": 3})
    assert description["skipped"] == quantized.skipped
    assert [layer["name"] for layer in description["layers"]] == list(quantized.layers)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"architecture": {"stem": "resnet8", "options": {"depth": 1202}, "num_classes": 10}}, "weights"),
        ({"architecture": {"stem": "resnet8", "options": {"depth": 6000002}, "num_classes": 10}}, "depth"),
        ({"architecture": {"stem": "resnet8", "options": {"widths": [9999999] * 4}, "num_classes": 10}}, "weights"),
        ({"architecture": {"stem": "resnet8", "options": {}, "num_classes": 10**7}}, "class_names"),
        ({"input_shape": [3, 20000, 20000]}, "input_shape"),
        ({"layers": [{"name": "conv1", "shape": [16, 10**9], "levels": 4, "bits": 2}]}, "conv1"),
    ],
)
def test_a_description_that_costs_more_than_its_tensors_could_hold_is_refused(small, changed, named, tmp_path):
    path = tmp_path / "model.safetensors"
    write_packed(path, quantize(small, [IMAGES], 2), describe("resnet8"))
    kind, description, tensors = container.read(path)
    container.write(path, kind, description | changed, tensors)  # with a checksum that fits
    with pytest.raises(UserError, match=named):
        read_model(path)


def test_five_levels_take_three_bits_and_no_step_counter_is_kept(small, tmp_path):
    quantized = quantize(small, [IMAGES], 2, grid={"alphabet": "published"}, first_last_bits=None)
    path = tmp_path / "model.safetensors"
    write_packed(path, quantized, describe("resnet8"))
    tensors = load_file(path)
    for name, layer in quantized.layers.items():
        assert tensors[f"{name}.weight.codes"].numel() == packed_length(layer.codes.numel(), 3)
        assert torch.equal(tensors[f"{name}.weight.scale"], layer.grid.scale)
    assert not any("num_batches_tracked" in name for name in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["resnet18"])
def test_a_2_bit_resnet18_takes_less_than_3_megabytes(stem, tmp_path):
    quantized = quantize(make(stem), [IMAGES[:4]], 2)
    size = write_packed(tmp_path / "model.safetensors", quantized, describe(stem))
    assert sum(layer.codes.numel() for layer in quantized.layers.values()) > 11_000_000
    assert size <= 3_000_000


def test_batch_norm_that_stays_float_is_kept(tmp_path):
    stem = next(stem for stem in models.available() if stem.startswith("wrn"))
    model = make(stem)
    quantized = quantize(model, [IMAGES], 4)
    assert any(isinstance(module, nn.BatchNorm2d) for module in quantized.model.modules())
    write_packed(tmp_path / "model.safetensors", quantized, describe(stem))
    read, _ = read_model(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(read(IMAGES), quantized.model(IMAGES))


def test_options_of_the_architecture_are_followed(tmp_path):
    options = {"widths": [8, 8, 12, 20]}
    quantized = quantize(make("resnet8", **options), [IMAGES], 4)
    write_packed(tmp_path / "model.safetensors", quantized, describe("resnet8", **options))
    read, _ = read_model(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(read(IMAGES), quantized.model(IMAGES))


def test_the_same_content_gives_the_same_bytes_and_leaves_nothing_beside_the_file(small, tmp_path):
    for name in ("a.safetensors", "b.safetensors", "a.safetensors"):
        write_packed(tmp_path / name, quantize(small, [IMAGES], 2), describe("resnet8"))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_float_file_is_the_whole_state_dict_and_a_checkpoint_too(small, tmp_path):
    path = tmp_path / "float.safetensors"
    size = write_float(path, small, describe("resnet8"))
    assert size == path.stat().st_size
    state = {name: value for name, value in small.state_dict().items() if "num_batches_tracked" not in name}
    tensors = load_file(path)
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)
    read, description = read_model(path)
    assert description["format"] == "compress-float-1"
    fresh = models.build("resnet8", 10).eval()
    load_weights(fresh, path)
    with torch.no_grad():
        assert torch.equal(read(IMAGES), small(IMAGES))
        assert torch.equal(fresh(IMAGES), small(IMAGES))


def test_a_file_of_a_later_format_is_refused(tmp_path):
    container.write(tmp_path / "model.safetensors", "compress-packed-2", {}, {})
    with pytest.raises(UserError, match=r"found the format compress-packed-2; accepted: compress-packed-1, compress-f"):
        read_model(tmp_path / "model.safetensors")


def test_reading_draws_no_random_numbers(small, tmp_path):
    write_float(tmp_path / "float.safetensors", small, describe("resnet8"))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    read_model(tmp_path / "float.safetensors")
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture(scope="module", params=[0.0, 0.9], ids=["dense", "bitmaps"])
def intact(request, small, tmp_path_factory):
    path = tmp_path_factory.mktemp("intact") / "model.safetensors"
    network = Magnitude(sparsity=request.param).pruned(copy.deepcopy(small), (3, 8, 8))
    write_packed(path, quantize(network, [IMAGES], 2), describe("resnet8"))
    _, description, _ = container.read(path)
    assert any("encoding" in layer for layer in description["layers"]) == bool(request.param)
    return path.read_bytes()


def refused(content, path):
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_model(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_refused(intact, kept, tmp_path):
    cut = kept if isinstance(kept, int) else int(kept * len(intact))
    assert "truncated" in refused(intact[:cut], tmp_path / "model.safetensors")


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9, 0.9999])
def test_an_altered_byte_is_refused(intact, share, tmp_path):
    place = int(share * len(intact))
    changed = bytearray(intact)
    changed[place] ^= 1
    assert int.from_bytes(intact[:8], "little") + 8 < place
    assert "altered" in refused(bytes(changed), tmp_path / "model.safetensors")


def test_an_altered_description_is_refused(intact, tmp_path):
    assert b"resnet8" in intact
    assert "altered" in refused(intact.replace(b"[0.5]", b"[0.7]", 1), tmp_path / "model.safetensors")


def test_appended_bytes_and_foreign_files_are_refused(intact, tmp_path):
    path = tmp_path / "model.safetensors"
    refused(intact + b"more", path)
    refused(b"not a model at all, but a line of text", path)
    header = json.dumps({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    message = refused(len(header).to_bytes(8, "little") + header + b"\0", path)
    assert "without a description" in message
    with pytest.raises(UserError, match="found no such file"):
        read_model(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="found a folder"):
        read_model(tmp_path)


def forge(intact, path, change):
    """A file with a right checksum and whatever `change(description, tensors)` made of its content."""
    path.write_bytes(intact)
    kind, description, tensors = container.read(path)
    change(description, tensors)
    container.write(path, kind, description, tensors)
    return path.read_bytes()


def lose_tensor(description, tensors):
    del tensors["fc.bias"]


def add_tensor(description, tensors):
    tensors["other"] = torch.zeros(1)


def shorten_codes(description, tensors):
    tensors["conv1.weight.codes"] = tensors["conv1.weight.codes"][:-1].clone()


def code_out_of_range(description, tensors):
    layer = next(layer for layer in description["layers"] if layer["levels"] == 4)
    layer["levels"] = 3
    tensors[f"{layer['name']}.weight.codes"][0] = 0xFF


def negative_scale(description, tensors):
    tensors["conv1.weight.scale"][0] = -1


def zero_point_off_the_grid(description, tensors):
    description["layers"][1]["levels"] = 2
    tensors[f"{description['layers'][1]['name']}.weight.zero_point"][:] = 3


def wrong_shape(description, tensors):
    tensors["fc.bias"] = torch.zeros(11)


def unknown_architecture(description, tensors):
    description["architecture"]["stem"] = "resnet9999"


def unknown_option(description, tensors):
    description["architecture"]["options"] = {"colour": 1}


def code_by_name(description, tensors):
    description["architecture"]["options"] = {"_target_": "os.system"}
    description["architecture"]["stem"] = "../../etc"


def unknown_layer(description, tensors):
    description["folded"] = [["nothing", "conv1"]]


def unknown_encoding(description, tensors):
    description["layers"][1]["encoding"] = "zip"


def other_encoding(description, tensors):
    layer = next(layer for layer in description["layers"] if layer["name"] == "layer3.0.conv2")
    layer["encoding"] = "dense" if "encoding" in layer else "bitmap"


def no_layers(description, tensors):
    del description["layers"]


@pytest.mark.parametrize(
    "change",
    [
        lose_tensor,
        add_tensor,
        shorten_codes,
        code_out_of_range,
        negative_scale,
        zero_point_off_the_grid,
        wrong_shape,
        unknown_architecture,
        unknown_option,
        code_by_name,
        unknown_layer,
        unknown_encoding,
        other_encoding,
        no_layers,
    ],
)
def test_content_that_does_not_fit_is_refused_though_its_checksum_is_right(intact, change, tmp_path):
    path = tmp_path / "model.safetensors"
    refused(forge(intact, path, change), path)


def test_a_forged_file_without_a_change_is_accepted(intact, tmp_path):
    path = tmp_path / "model.safetensors"
    assert forge(intact, path, lambda description, tensors: None) == intact
    read_model(path)


def test_a_float64_network_is_not_written_with_float32_scales(small, tmp_path):
    quantized = quantize(models.build("resnet8", 10).double(), [IMAGES], 4)
    with pytest.raises(UserError, match=r"found torch.float64 weights in conv1; accepted: torch.float32"):
        write_packed(tmp_path / "model.safetensors", quantized, describe("resnet8"))
    assert not list(tmp_path.iterdir())


def test_a_path_may_be_text_as_in_the_readme(tmp_path):
    with pytest.raises(UserError, match=r"absent\.safetensors: found no such file"):
        read_model(str(tmp_path / "absent.safetensors"))


CONTENT = [
    ({"class_names": ["a"] * 9}, {}, "class_names: found 9 names; accepted: one for each of the 10 outputs"),
    ({"class_names": [1] * 10}, {}, "class_names: found 10 names"),
    ({"class_names": None}, {}, "class_names: found none"),
    ({"standard_deviation": [0.0]}, {}, r"standard_deviation: found \[0.0\]; accepted: finite numbers above 0"),
    ({"standard_deviation": [0.5, 0.5]}, {}, "standard_deviation: found"),
    ({"mean": ["0.5"]}, {}, "mean: found"),
    ({"mean": []}, {}, "mean: found"),
    ({"mean": [10**400]}, {}, r"mean: found .*; accepted: finite numbers, one or one for each channel"),
    ({"input_shape": [3, 8]}, {}, "input_shape: found"),
    ({}, {"fc.bias": float("nan")}, "fc.bias: found values that are no numbers; accepted: finite weights"),
    ({}, {"fc.weight": float("inf")}, "fc.weight: found values that are no numbers"),
    ({}, {"bn1.running_mean": float("nan")}, "bn1.running_mean: found values that are no numbers"),
]


@pytest.mark.parametrize(("changes", "values", "message"), CONTENT)
def test_a_signed_file_is_refused_where_it_says_what_no_network_is(small, changes, values, message, tmp_path):
    path = tmp_path / "model.safetensors"
    write_float(path, small, describe("resnet8"))
    kind, description, tensors = container.read(path)
    for name, value in values.items():
        tensors[name].view(-1)[0] = value
    container.write(path, kind, description | changes, tensors)
    with pytest.raises(UserError, match=f"^{path}: {message}"):
        read_model(path)
