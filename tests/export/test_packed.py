"""Model files: written and read back to the same logits, small, repeatable, and refused when they are not intact."""

import copy
import json
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from compress import models
from compress.errors import UserError
from compress.export import container, packed
from compress.export.bits import packed_length
from compress.export.deflated import RAW
from compress.export.description import NetworkDescription
from compress.export.encodings import ENCODINGS, coded_bits, layer_bytes
from compress.export.packed import file_bytes, read_model, write_float, write_packed
from compress.export.weights import load_weights
from compress.pruning.magnitude import Magnitude
from compress.quantization import quantize
from compress.quantization.activations import input_quantizers
from compress.quantization.grid import Grid
from compress.quantization.quantized import QuantizedLayer, set_weight
from tests.models import odd_networks


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
    assert description["format"] == "compress-packed-2"
    assert description["architecture"] == {"stem": "resnet8", "options": {}, "num_classes": 10}
    assert (description["mean"], description["input_shape"], description["extra"]) == ([0.5], [3, 8, 8], {"seed": 3})
    assert description["skipped"] == quantized.skipped
    assert [layer["name"] for layer in description["layers"]] == list(quantized.layers)


def round_trip(quantized, description, path, network=None):
    """The description in the file of `quantized`, whose network has to come back bit for bit."""
    write_packed(path, quantized, description)
    model, found = read_model(path, network)
    expected = {name: value for name, value in quantized.model.state_dict().items() if "num_batches" not in name}
    state = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    images = torch.randn(4, *description.input_shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(model(images), quantized.model(images))
    return found


@pytest.mark.parametrize("skip", [[], ["left"], ["head"]])
@pytest.mark.parametrize("network", odd_networks.EVERY)
def test_a_network_that_uses_its_weights_in_an_unusual_way_comes_back(network, skip, tmp_path):
    model = odd_networks.make(network)
    names = {name for name, _ in model.named_modules()}
    images = torch.randn(32, *odd_networks.SHAPE, generator=torch.Generator().manual_seed(0))
    quantized = quantize(model, [images], 4, skip=[name for name in skip if name in names], activation_bits=8)
    about = replace(describe("module"), input_shape=odd_networks.SHAPE, class_names=["a", "b", "c", "d"])
    about = replace(about, architecture={"stem": "module", "options": {}, "num_classes": odd_networks.CLASSES})
    found = round_trip(quantized, about, tmp_path / "model.safetensors", model)
    assert found["tied"] == quantized.tied
    assert found["skipped"] == quantized.skipped
    assert {each["name"] for each in found["inputs"]} == set(input_quantizers(quantized.model))


def test_a_float_weight_that_two_layers_share_is_kept_once(tmp_path):
    model = odd_networks.make(odd_networks.TiedWeights)
    quantized = quantize(model, [torch.randn(8, *odd_networks.SHAPE)], 4, skip=["left"])
    about = replace(describe("module"), input_shape=odd_networks.SHAPE, class_names=["a", "b", "c", "d"])
    about = replace(about, architecture={"stem": "module", "options": {}, "num_classes": odd_networks.CLASSES})
    round_trip(quantized, about, tmp_path / "model.safetensors", model)
    sizes, _ = streams(tmp_path / "model.safetensors")
    assert "right.weight" in quantized.float_state
    assert sizes["float32"] < 4 * sum(value.numel() for value in quantized.float_state.values())


@pytest.mark.parametrize("stem", ["mobilenetv2", "shufflenetv2", "vgg8"])
def test_depthwise_convolutions_and_layers_with_and_without_a_bias_come_back(stem, tmp_path):
    quantized = quantize(make(stem), [IMAGES], 4)
    round_trip(quantized, describe(stem), tmp_path / "model.safetensors")


@pytest.mark.parametrize("step", [0.002, 0.02, 0.1, 0.5, 100.0])
def test_layers_with_one_step_and_codes_without_bounds_come_back(small, step, tmp_path):
    quantized = quantize(small, [IMAGES], 8)
    layers = {}
    for name, layer in quantized.layers.items():
        steps = (layer.grid.dequantize(layer.codes) / step).round().to(torch.int32)
        lowest, levels = int(steps.min()), max(2, int(steps.max() - steps.min()) + 1)
        rows = len(steps)
        grid = Grid(torch.full((rows,), step), torch.full((rows,), -lowest, dtype=torch.int32), levels)
        layers[name] = QuantizedLayer(steps - lowest, grid, grid.bits, None)
        set_weight(quantized.model.get_submodule(name), layers[name].codes, grid, None)
    found = round_trip(replace(quantized, layers=layers), describe("resnet8"), tmp_path / "model.safetensors")
    assert [each["levels"] for each in found["layers"]] == [layer.grid.levels for layer in layers.values()]
    sizes, _ = streams(tmp_path / "model.safetensors")
    weights = sum(layer.codes.numel() for layer in layers.values())
    assert sizes["codes"] < (120 * len(layers) + weights / 700 if step == 100 else 1.5 * weights)


READING = """
import sys, torch
from compress.export.packed import read_model
model, _ = read_model(sys.argv[1])
print(*(int(value.contiguous().view(torch.int32).sum()) for value in model.state_dict().values() if value.dim()))
"""


@pytest.mark.slow
def test_every_kind_of_processor_reads_the_same_weights(small, tmp_path):
    path = tmp_path / "model.safetensors"
    write_packed(path, quantize(small, [IMAGES], 3), describe("resnet8"))
    read = [
        subprocess.run(
            [sys.executable, "-c", READING, str(path)],
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for capability in ("default", "avx2")
    ]
    model, _ = read_model(path)
    state = [value for value in model.state_dict().values() if value.dim()]
    expected = " ".join(str(int(value.contiguous().view(torch.int32).sum())) for value in state)
    assert read == [f"{expected}\n"] * 2


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"architecture": {"stem": "resnet8", "options": {"depth": 1202}, "num_classes": 10}}, "weights"),
        ({"architecture": {"stem": "resnet8", "options": {"depth": 6000002}, "num_classes": 10}}, "depth"),
        ({"architecture": {"stem": "resnet8", "options": {"widths": [9999999] * 4}, "num_classes": 10}}, "weights"),
        ({"architecture": {"stem": "resnet8", "options": {}, "num_classes": 10**7}}, "class_names"),
        ({"input_shape": [3, 20000, 20000]}, "input_shape"),
        ({"architecture": {"stem": "resnet18", "options": {}, "num_classes": 10**8}}, "class_names"),
        ({"words": 10**12}, "words"),
    ],
)
def test_a_description_that_costs_more_than_its_tensors_could_hold_is_refused(small, changed, named, tmp_path):
    path = tmp_path / "model.safetensors"
    write_packed(path, quantize(small, [IMAGES], 2), describe("resnet8"))
    kind, description, tensors = container.read(path)
    container.write(path, kind, description | changed, tensors, deflated=True)  # with a checksum that fits
    with pytest.raises(UserError, match=named):
        read_model(path)


@pytest.mark.parametrize("write", [write_packed, write_float])
def test_a_network_that_would_take_more_than_half_of_the_memory_is_refused(small, write, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write(path, quantize(small, [IMAGES], 2) if write is write_packed else small, describe("resnet8"))
    weights = models.count_parameters(small)
    monkeypatch.setattr(packed, "free_bytes", lambda device: 2 * 8 * weights)
    said = r"input_shape: found .* the network of 78,042 weights takes [1-9]\d* MB; accepted: .* at most [1-9]"
    with pytest.raises(UserError, match=said):
        read_model(path)
    monkeypatch.setattr(packed, "free_bytes", lambda device: 2 * 40 * weights)
    read_model(path)


def streams(path):
    """(bytes of each tensor in a file, the bytes of everything else)."""
    sizes = {name: value.numel() * value.element_size() for name, value in load_file(path).items()}
    return sizes, path.stat().st_size - sum(sizes.values())


def test_the_file_has_the_codes_and_two_bytes_for_each_scale_and_bias_and_less_than_1500_more(tmp_path):
    origin = {"configuration": "5" * 32 + "ab" * 16, "seed": 0, "versions": {"commit": "0" * 40, "torch": "2.14.1"}}
    # At 3 bits scales and biases are rounded to float16; these others no longer are.
    halves = quantize(make("resnet20"), [IMAGES], 3)
    quantized = replace(
        halves,
        layers={
            name: replace(layer, grid=replace(layer.grid, scale=layer.grid.scale * (1 + 2**-20)))
            for name, layer in halves.layers.items()
        },
        float_state={name: value * (1 + 2**-20) for name, value in halves.float_state.items()},
    )
    scales = sum(len(layer.grid.scale) for layer in quantized.layers.values())
    numbers = scales + sum(value.numel() for value in quantized.float_state.values())
    for each, kept_in, width in ((quantized, "float32", 4), (halves, "float16", 2)):
        size = write_packed(tmp_path / "model.safetensors", each, replace(describe("resnet20"), extra=origin))
        sizes, header = streams(tmp_path / "model.safetensors")
        assert sizes.keys() == {"codes", "description", kept_in}
        assert 8 * sizes["codes"] == coded_bits(each)
        assert sizes[kept_in] == width * numbers
        assert sizes["description"] + header < 1000
        assert size == file_bytes(each, replace(describe("resnet20"), extra=origin))


def test_equal_scales_are_one_number_and_counters_and_equal_zero_points_are_none(small, tmp_path):
    quantized = quantize(small, [IMAGES], 4, grid={"granularity": "layer", "zero_point": "symmetric"})
    write_packed(tmp_path / "model.safetensors", quantized, describe("resnet8"))
    sizes, _ = streams(tmp_path / "model.safetensors")
    numbers = len(quantized.layers) + sum(value.numel() for value in quantized.float_state.values())
    assert sizes["float16"] == 2 * numbers


def test_the_bytes_of_a_layer_are_those_by_which_the_file_grows(small, tmp_path):
    quantized = quantize(small, [IMAGES], 4)
    codes = sum(map(layer_bytes, quantized.layers.values()))
    zeros = sum(len(layer.grid.zero_point) for layer in quantized.layers.values())
    assert 0 <= coded_bits(quantized) / 8 - codes < 8 + zeros / 4
    write_packed(tmp_path / "model.safetensors", quantized, describe("resnet8"), encodings=["dense"])
    dense = sum(packed_length(layer.codes.numel(), layer.grid.bits) for layer in quantized.layers.values())
    assert dense < streams(tmp_path / "model.safetensors")[0]["codes"] < dense + 8 + zeros / 4


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
    container.write(tmp_path / "model.safetensors", "compress-packed-3", {}, {})
    with pytest.raises(UserError, match=r"found the format compress-packed-3; accepted: compress-packed-2, compress-f"):
        read_model(tmp_path / "model.safetensors")


def test_reading_draws_no_random_numbers(small, tmp_path):
    write_float(tmp_path / "float.safetensors", small, describe("resnet8"))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    read_model(tmp_path / "float.safetensors")
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture(scope="module")
def files(small, tmp_path_factory):
    """By encoding, the bytes of a file whose layers all have it."""
    folder = tmp_path_factory.mktemp("intact")
    network = Magnitude(sparsity=0.9).pruned(copy.deepcopy(small), (3, 8, 8))
    quantized = quantize(network, [IMAGES], 2)
    for name in ENCODINGS:
        write_packed(folder / name, quantized, describe("resnet8"), [name])
        _, description, _ = container.read(folder / name)
        assert {layer["encoding"] for layer in description["layers"]} == {name}
    return {name: (folder / name).read_bytes() for name in ENCODINGS}


@pytest.fixture(params=ENCODINGS)
def intact(request, files):
    return files[request.param]


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


def test_an_altered_header_is_refused(intact, tmp_path):
    for name, other in ((b"packed-2", b"packed-3"), (b"float32", b"float64"), (b"sha256", b"sha255")):
        assert name in intact
        refused(intact.replace(name, other, 1), tmp_path / "model.safetensors")


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
    container.write(path, kind, description, tensors, deflated=True)
    return path.read_bytes()


def lose_stream(description, tensors):
    del tensors["float32"]


def add_stream(description, tensors):
    tensors["int8"] = torch.zeros(1, dtype=torch.int8)


def foreign_stream(description, tensors):
    tensors["other"] = torch.zeros(1)


def shorten_codes(description, tensors):
    tensors["codes"] = tensors["codes"][:-1].clone()


def append_to_codes(description, tensors):
    tensors["codes"] = torch.cat([tensors["codes"], tensors["codes"][-1:]])


def empty_codes(description, tensors):
    tensors["codes"] = tensors["codes"][:0].clone()


def codes_of_another_type(description, tensors):
    tensors["codes"] = tensors["codes"].to(torch.int32)


def fewer_words(description, tensors):
    description["words"] -= 1


def code_out_of_range(description, tensors):
    layer = next(layer for layer in description["layers"] if layer["levels"] == 4)
    layer["levels"] = 3
    tensors["codes"][-100:] = 0xFF


def negative_scale(description, tensors):
    tensors["float32"][0] = -1


def infinite_bias(description, tensors):
    tensors["float32"][-1] = float("inf")


def shorten_numbers(description, tensors):
    tensors["float32"] = tensors["float32"][:-1].clone()


def append_to_numbers(description, tensors):
    tensors["float32"] = torch.cat([tensors["float32"], torch.zeros(1)])


def numbers_in_two_dimensions(description, tensors):
    tensors["float32"] = tensors["float32"][None]


def halves_for_floats(description, tensors):
    tensors["float32"] = tensors["float32"].half()


def zero_point_off_the_grid(description, tensors):
    description["layers"][1]["zero_point"] = [7, 7]


def zero_points_of_no_end(description, tensors):
    description["layers"][1]["zero_point"] = [0, 10**12]


def levels_of_no_end(description, tensors):
    description["layers"][1]["levels"] = 10**12


def levels_of_16_bits(description, tensors):
    description["layers"][1]["levels"] = 2**16


def more_scales(description, tensors):
    description["layers"][1]["scale"][1] += 1


def one_scale(description, tensors):
    description["layers"][1]["scale"][1] = 1


def scale_of_another_type(description, tensors):
    description["layers"][1]["scale"][0] = "float64"


def no_bias(description, tensors):
    del description["layers"][0]["bias"]


def inputs_of_three_levels(description, tensors):
    description["layers"][0]["inputs"] = 3


def one_layer_less(description, tensors):
    del description["layers"][-1]


def a_layer_without_codes(description, tensors):
    description["layers"][-1] = {"bias": True}


def layers_that_are_none(description, tensors):
    description["layers"] = [3] * len(description["layers"])


def other_structure(description, tensors):
    description["structure"] ^= 1


def other_state(description, tensors):
    description["state"] = description["state"][:-1]


def tied_to_nothing(description, tensors):
    description["tied"] = {"fc": "conv1"}


def shared_with_nothing(description, tensors):
    description["shared"] = {"fc.bias": "nothing"}


def unknown_architecture(description, tensors):
    description["architecture"]["stem"] = "resnet9999"


def another_network(description, tensors):
    description["architecture"]["options"] = {"widths": [16, 16, 32, 48]}


def unknown_option(description, tensors):
    description["architecture"]["options"] = {"colour": 1}


def code_by_name(description, tensors):
    description["architecture"]["options"] = {"_target_": "os.system"}
    description["architecture"]["stem"] = "../../etc"


def unknown_encoding(description, tensors):
    description["layers"][1]["encoding"] = "zip"


def other_encoding(description, tensors):
    layer = description["layers"][0]
    layer["encoding"] = "dense" if layer["encoding"] != "dense" else "bitmap"


def no_layers(description, tensors):
    del description["layers"]


OF_CODES = [shorten_codes, append_to_codes, empty_codes, fewer_words, code_out_of_range, other_encoding]
OTHERS = [
    *(lose_stream, add_stream, foreign_stream, codes_of_another_type, negative_scale, infinite_bias, shorten_numbers),
    *(append_to_numbers, numbers_in_two_dimensions, halves_for_floats, zero_point_off_the_grid, zero_points_of_no_end),
    *(levels_of_no_end, levels_of_16_bits, more_scales, one_scale, scale_of_another_type, no_bias, no_layers),
    *(inputs_of_three_levels, one_layer_less, a_layer_without_codes, layers_that_are_none, other_structure),
    *(other_state, tied_to_nothing, shared_with_nothing, unknown_architecture, another_network, unknown_option),
    *(code_by_name, unknown_encoding),
]


@pytest.mark.parametrize("change", OF_CODES)
def test_codes_that_do_not_fit_are_refused_though_their_checksum_is_right(intact, change, tmp_path):
    path = tmp_path / "model.safetensors"
    refused(forge(intact, path, change), path)


@pytest.mark.parametrize("change", OTHERS)
def test_content_that_does_not_fit_is_refused_though_its_checksum_is_right(files, change, tmp_path):
    path = tmp_path / "model.safetensors"
    refused(forge(files["entropy"], path, change), path)


def test_a_forged_file_without_a_change_is_accepted(intact, tmp_path):
    path = tmp_path / "model.safetensors"
    assert forge(intact, path, lambda description, tensors: None) == intact
    read_model(path)


def test_a_float64_network_is_not_written_with_float32_scales(small, tmp_path):
    quantized = quantize(models.build("resnet8", 10).double(), [IMAGES], 4)
    with pytest.raises(UserError, match=r"found torch.float64 weights in conv1; accepted: torch.float32"):
        write_packed(tmp_path / "model.safetensors", quantized, describe("resnet8"))
    assert not list(tmp_path.iterdir())


def test_a_description_that_would_not_be_read_again_is_not_written(small, tmp_path):
    about = replace(describe("resnet8"), extra={"note": "x" * (1 << 22)})
    with pytest.raises(UserError, match=r"found a description of 4,[0-9,]+ characters; accepted: at most 4,194,304"):
        write_packed(tmp_path / "model.safetensors", quantize(small, [IMAGES], 4), about)
    assert not list(tmp_path.iterdir())


def test_a_description_of_gigabytes_in_a_small_file_is_refused(files, tmp_path):
    compressor = zlib.compressobj(9, zlib.DEFLATED, RAW, 9)
    bomb = b"".join(compressor.compress(bytes(1 << 24)) for _ in range(64)) + compressor.flush()
    path = tmp_path / "model.safetensors"
    path.write_bytes(files["entropy"])
    kind, description, tensors = container.read(path)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(container, "deflate", lambda text: bomb)
        container.write(path, kind, description, tensors, deflated=True)
    assert path.stat().st_size < 1_200_000
    assert "a description that is not a JSON object" in refused(path.read_bytes(), path)


def test_a_path_may_be_text_as_in_the_guide(tmp_path):
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


@pytest.mark.parametrize("aliases", [{"x": []}, {"x": "nothing"}, {"fc.bias": "fc.weight"}, ["x"], 3])
def test_other_names_of_tensors_that_are_none_are_refused(small, aliases, tmp_path):
    path = tmp_path / "model.safetensors"
    write_float(path, small, describe("resnet8"))
    kind, description, tensors = container.read(path)
    container.write(path, kind, description | {"aliases": aliases}, tensors)
    assert "found aliases that its tensors do not fit" in refused(path.read_bytes(), path)
