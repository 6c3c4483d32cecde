"""ONNX files: the integers that were evaluated, the logits of the network, integer kernels, and one file only."""

import dataclasses
import itertools
import json
import subprocess
import sys
from collections import Counter
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import (
    IMAGES,
    LateReader,
    Repeater,
    TokenMixer,
    describe,
    distance,
    logits,
    lone_convolution,
    make,
    with_inputs,
)
from onnx import TensorProto, numpy_helper
from torch import nn
from torch.nn import functional as F

from compress.errors import UserError
from compress.evaluation import paired_latency_ms
from compress.export import onnx as onnx_format
from compress.export.onnx import Onnx, OnnxModel
from compress.export.onnx_graph import storage
from compress.export.onnx_runtime import start
from compress.quantization import GridOptions, Options, quantize
from compress.quantization.rates import RateQuantization
from compress.quantization.solvers import RTN

# The exporter of PyTorch takes seconds for each network.
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def small():
    return make("resnet8")


def initializers(path):
    return {each.name: each for each in onnx.load(path).graph.initializer}


def optimised(path, folder):
    """How often each operator stands in the graph that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stem", "bits", "options", "kind", "opset"),
    [
        slow("resnet8", 8, {}, TensorProto.INT8, 18),
        ("resnet8", 4, {"first_last_bits": None}, TensorProto.INT4, 21),
        slow("resnet8", 3, {"first_last_bits": None}, TensorProto.INT4, 21),
        slow("resnet8", 2, {"first_last_bits": None}, TensorProto.INT2, 25),
        slow("resnet8", 1, {"first_last_bits": None}, TensorProto.INT2, 25),
        slow("resnet8", 2, {"grid": {"alphabet": "published"}, "first_last_bits": None}, TensorProto.INT4, 21),
        slow("resnet8", 4, {"grid": {"alphabet": "published"}, "first_last_bits": None}, TensorProto.INT8, 18),
        slow("mobilenetv2", 4, {"first_last_bits": None}, TensorProto.INT4, 21),
        slow("wrn_16_1", 8, {}, TensorProto.INT8, 18),
    ],
)
def test_a_file_has_the_codes_and_the_logits_that_were_evaluated(stem, bits, options, kind, opset, tmp_path):
    quantized = quantize(make(stem), [IMAGES[:8]], bits, solver=RTN(), **options)
    path = tmp_path / "model.onnx"
    Onnx().write(path, quantized, dataclasses.replace(describe(stem), extra={"seed": 3}))
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert onnx.load(path).opset_import[0].version == opset

    stored = initializers(path)
    for name, layer in quantized.layers.items():
        codes = stored[f"{name}.weight.codes"]
        assert codes.data_type == kind
        offset = layer.grid.levels // 2
        assert np.array_equal(numpy_helper.to_array(codes).astype(int) + offset, layer.codes.numpy())
        zero_point = numpy_helper.to_array(stored[f"{name}.weight.zero_point"]).astype(int) + offset
        assert np.array_equal(zero_point, layer.grid.zero_point.numpy())
        assert np.array_equal(numpy_helper.to_array(stored[f"{name}.weight.scale"]), layer.grid.scale.numpy())
        assert f"{name}.weight" not in stored

    read = OnnxModel.read(path)
    for count in (1, 32):
        assert distance(read(IMAGES[:count]), logits(quantized.model, IMAGES[:count])) < 1e-5
    assert read.description["format"] == "compress-onnx-1"
    assert read.description["architecture"] == {"stem": stem, "options": {}, "num_classes": 10}
    assert read.description["extra"] == {"seed": 3}
    assert [(each["name"], each["bits"]) for each in read.description["layers"]] == [
        (name, layer.bits) for name, layer in quantized.layers.items()
    ]


@pytest.mark.slow
def test_weights_of_2_bits_take_a_quarter_of_a_byte(small, tmp_path):
    quantized = quantize(small, [IMAGES[:8]], 2, first_last_bits=None)
    Onnx().write(tmp_path / "model.onnx", quantized, describe("resnet8"))
    for name, layer in quantized.layers.items():
        stored = initializers(tmp_path / "model.onnx")[f"{name}.weight.codes"]
        assert len(stored.raw_data) == -(-layer.codes.numel() // 4)


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [False, True])
def test_linear_layers_on_tokens_have_their_codes_turned(inputs, tmp_path):
    torch.manual_seed(0)
    quantized = quantize(TokenMixer(), [IMAGES], 4, first_last_bits=None)
    if inputs:
        with_inputs(quantized)
    path = tmp_path / "model.onnx"
    Onnx().write(path, quantized, describe("mixer"))
    stored = numpy_helper.to_array(initializers(path)["mix.weight.codes"]).astype(int)
    assert np.array_equal(stored.T + 8, quantized.layers["mix"].codes.numpy())
    assert distance(OnnxModel.read(path)(IMAGES), logits(quantized.model)) < (0.02 if inputs else 1e-5)


def test_inputs_that_are_not_quantized_in_the_file_are_not_by_the_runtime_either(tmp_path):
    torch.manual_seed(0)
    quantized = quantize(TokenMixer(), [IMAGES], 8, first_last_bits=None)
    path = tmp_path / "model.onnx"
    Onnx().write(path, quantized, describe("mixer"))
    [found] = start(path.read_bytes()).run(["logits"], {"images": IMAGES.numpy()})
    assert distance(torch.from_numpy(found), logits(quantized.model)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_called_again_and_one_that_sees_no_image_keep_their_codes(bits, tmp_path):
    torch.manual_seed(0)
    quantized = quantize(Repeater(), [IMAGES], bits, first_last_bits=None)
    assert "positions" in quantized.layers
    path = tmp_path / "model.onnx"
    Onnx().write(path, quantized, describe("mixer"))
    assert distance(OnnxModel.read(path)(IMAGES), logits(quantized.model)) < 1e-5


def test_a_convolution_on_quantized_inputs_computes_the_sum_of_its_codes(tmp_path):
    """Against integers: scale_x scale_w sum (x - x0)(w - w0) + bias, the bias rounded to a step of that product."""
    quantized = lone_convolution([0.01, 0.02], [0.7, -0.4])
    path = tmp_path / "model.onnx"
    Onnx().write(path, quantized, describe("conv", 6))
    x = ((IMAGES.double() / 0.03).round() + 120).clamp(0, 255) - 120
    weight = quantized.layers["0"].codes.double() - torch.tensor([128.0, 127.0]).reshape(2, 1, 1, 1)
    step = torch.tensor([0.0003, 0.0006], dtype=torch.float64)
    bias = (torch.tensor([0.7, -0.4], dtype=torch.float64) / step).round()
    expected = F.conv2d(x, weight, bias) * step.reshape(2, 1, 1)
    assert (OnnxModel.read(path)(IMAGES) - expected).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("weight_scale", [1e-12, 1e-9])
def test_the_bias_of_a_channel_that_is_almost_off_is_not_cut(weight_scale, tmp_path):
    quantized = lone_convolution([weight_scale, 0.01], [3.0, -2.0])
    path = tmp_path / "model.onnx"
    Onnx().write(path, quantized, describe("conv", 6))
    found, expected = OnnxModel.read(path)(IMAGES), logits(quantized.model)
    assert (found[:, 0] - expected[:, 0]).abs().max() < 1e-5
    assert (found[:, 1] - expected[:, 1]).abs().max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "levels"),
    [(4, 256), slow(8, 256), slow(2, 256), slow(8, 64), slow(4, 16)],
)
def test_quantized_inputs_give_the_classes_of_the_network(small, bits, levels, tmp_path):
    quantized = quantize(small, [IMAGES], bits)
    unrounded = logits(quantized.model)
    expected = logits(with_inputs(quantized, levels).model)
    path = tmp_path / "model.onnx"
    Onnx().write(path, quantized, describe("resnet8"), calibration_batches=[IMAGES])
    read = OnnxModel.read(path)
    # One code that is rounded the other way moves codes of all later layers, so the error is compared with the one that
    # quantizing the inputs makes; the test of a lone convolution has no such excuse.
    assert distance(read(IMAGES), expected) < 2 * distance(unrounded, expected)
    assert (read(IMAGES).argmax(1) == expected.argmax(1)).float().mean() >= 0.9
    assert [each["levels"] for each in read.description["inputs"]] == [levels] * len(quantized.layers)
    for name, layer in quantized.layers.items():
        stored = numpy_helper.to_array(initializers(path)[f"{name}.weight.codes"]).astype(int)
        assert np.array_equal(stored + layer.grid.levels // 2, layer.codes.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, slow(2)])
def test_all_convolutions_of_a_resnet_run_on_integer_kernels(small, bits, tmp_path):
    quantized = with_inputs(quantize(small, [IMAGES], bits))
    convolutions = sum(isinstance(module, nn.Conv2d) for module in quantized.model.modules())
    path = tmp_path / "model.onnx"
    Onnx().write(path, quantized, describe("resnet8"), calibration_batches=[IMAGES])
    operators = optimised(path, tmp_path)
    assert operators["QLinearConv"] == convolutions
    assert operators["QLinearAdd"] == 2  # of three: the last one's sum goes on as float
    assert operators["QGemm"] == 1
    assert not {"Conv", "FusedConv", "Gemm"} & set(operators)
    Onnx().write(path, quantized, describe("resnet8"))
    assert 0 < optimised(path, tmp_path)["QLinearConv"] < convolutions


def test_a_sum_that_comes_before_the_reader_whose_grid_it_shares_is_computed_after_that_grid(tmp_path):
    torch.manual_seed(0)
    quantized = with_inputs(quantize(LateReader(), [IMAGES], 8))
    path = tmp_path / "model.onnx"
    Onnx().write(path, quantized, describe("late", 8), calibration_batches=[IMAGES])
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert distance(OnnxModel.read(path)(IMAGES), logits(quantized.model)) < 0.01


@pytest.mark.slow
def test_depth_wise_convolutions_run_on_integer_kernels_too(tmp_path):
    quantized = with_inputs(quantize(make("mobilenetv2"), [IMAGES], 8, solver=RTN()))
    path = tmp_path / "model.onnx"
    Onnx().write(path, quantized, describe("mobilenetv2"), calibration_batches=[IMAGES])
    assert optimised(path, tmp_path)["QLinearConv"] >= 52
    assert distance(OnnxModel.read(path)(IMAGES), logits(quantized.model)) < 0.02


@pytest.mark.slow
def test_a_layer_of_float_weights_on_quantized_inputs_keeps_them(small, tmp_path):
    quantized = with_inputs(quantize(small, [IMAGES], 8))
    with torch.no_grad():
        for name in quantized.layers:
            layer = quantized.model.get_submodule(name)
            layer.weight.copy_(layer.weight * 1.001 + 1e-4)  # off the grid
    float_weights = dataclasses.replace(quantized, layers={})
    Onnx().write(tmp_path / "model.onnx", float_weights, describe("resnet8"))
    assert distance(OnnxModel.read(tmp_path / "model.onnx")(IMAGES), logits(quantized.model)) < 0.003


def test_the_float_file_has_the_logits_of_the_network_and_no_batch_norm(small, tmp_path):
    path = tmp_path / "float.onnx"
    Onnx().write(path, small, describe("resnet8"))
    read = OnnxModel.read(path)
    assert distance(read(IMAGES), logits(small)) < 1e-5
    assert read.description["class_names"] == [str(digit) for digit in range(10)]
    assert not {"BatchNormalization", "DequantizeLinear"} & {node.op_type for node in onnx.load(path).graph.node}
    assert any(isinstance(module, nn.BatchNorm2d) for module in small.modules())


@pytest.mark.slow
def test_the_same_network_gives_the_same_bytes_in_another_process_and_nothing_is_printed(tmp_path):
    script = """
import sys, torch
from pathlib import Path
sys.path.insert(0, "tests/export")
from networks import IMAGES, describe, make, with_inputs
from compress.export.onnx import Onnx
from compress.quantization import quantize
quantized = with_inputs(quantize(make("resnet8"), [IMAGES], 4))
Onnx().write(Path(sys.argv[1]), quantized, describe("resnet8"), calibration_batches=[IMAGES])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.onnx"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for _ in range(2):
        quantized = with_inputs(quantize(make("resnet8"), [IMAGES], 4))
        Onnx().write(tmp_path / "b.onnx", quantized, describe("resnet8"), calibration_batches=[IMAGES])
        assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]
    assert str(tmp_path).encode() not in (tmp_path / "a.onnx").read_bytes()
    assert b"compress/models" not in (tmp_path / "a.onnx").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_a_network_of_a_rate_has_the_same_codes_in_the_narrowest_integers(small, tmp_path, activation_bits):
    options = Options(activation_bits=activation_bits)
    quantized = RateQuantization(options, small, [IMAGES])(5.0)
    path = tmp_path / "model.onnx"
    Onnx().write(path, quantized, describe("resnet8"), calibration_batches=[IMAGES])
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    of_layers = {name: kinds[f"{name}.weight.codes"] for name in quantized.layers}
    assert of_layers == {name: storage(layer.grid.levels)[0] for name, layer in quantized.layers.items()}
    assert len(set(of_layers.values())) > 1
    computed, _ = Onnx().read(path)
    expected = logits(quantized.model)
    assert (computed(IMAGES) - expected).norm() < (1e-4 if activation_bits is None else 0.1) * expected.norm()


@pytest.mark.slow
def test_writing_leaves_the_network_with_its_quantized_inputs(small, tmp_path):
    quantized = with_inputs(quantize(small, [IMAGES], 4))
    before = logits(quantized.model)
    Onnx().write(tmp_path / "model.onnx", quantized, describe("resnet8"), calibration_batches=[IMAGES])
    assert torch.equal(logits(quantized.model), before)


def test_more_than_65536_levels_are_refused(small, tmp_path):
    quantized = quantize(small, [IMAGES[:4]], 16, grid=GridOptions(alphabet="published"))
    with pytest.raises(UserError, match=r"found a weight on \d+; accepted in an ONNX file: at most 65536"):
        Onnx().write(tmp_path / "model.onnx", quantized, describe("resnet8"))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def file(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    Onnx().write(path, quantize(small, [IMAGES[:4]], 8), describe("resnet8"))
    return path


def test_files_that_are_damaged_or_foreign_are_refused_by_name(file, tmp_path):
    content = file.read_bytes()
    path = tmp_path / "bad.onnx"
    model = onnx.load(file)
    weight = next(each for each in model.graph.initializer if each.data_type == TensorProto.INT8)
    start = content.index(weight.raw_data)
    del model.metadata_props[:]
    for bad, message in [
        (b"", "truncated"),
        (b"not a network", "truncated"),
        (content[: len(content) // 2], "truncated"),
        (content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :], "does not match its checksum"),
        (model.SerializeToString(), "without a description"),
    ]:
        path.write_bytes(bad)
        with pytest.raises(UserError, match=rf"bad\.onnx: found .*{message}.*; accepted: "):
            OnnxModel.read(path)
    with pytest.raises(UserError, match=r"none\.onnx: found no such file"):
        OnnxModel.read(tmp_path / "none.onnx")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_extra(small, file, missing, uninstall, tmp_path):
    quantized = quantize(small, [IMAGES[:4]], 8)
    uninstall(missing)
    with pytest.raises(UserError, match=rf"{missing} is not installed; pip install 'compress\[onnx\]'"):
        Onnx().write(tmp_path / "model.onnx", quantized, describe("resnet8"))
    if missing == "onnxruntime":
        with pytest.raises(UserError, match="onnxruntime is not installed"):
            OnnxModel.read(file)
    else:
        assert OnnxModel.read(file)(IMAGES).shape == (32, 10)


def test_latencies_are_one_per_model_and_the_models_take_turns():
    calls = []
    models_ = [lambda images, index=index: calls.append((index, tuple(images.shape))) for index in range(2)]
    threads = torch.get_num_threads()
    found = paired_latency_ms(models_, (3, 8, 8), batch=4, repeats=5)
    assert len(found) == 2
    assert all(value > 0 for value in found)
    # Each is called once before the call that counts.
    assert calls == [(index, (4, 3, 8, 8)) for index in (0, 0, 1, 1)] * 6
    assert torch.get_num_threads() == threads


def test_a_machine_that_changes_its_speed_leaves_latencies_in_proportion(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("compress.evaluation.time.perf_counter", lambda: clock[0])
    # Of each turn; the first warms up, and in the last the speed changes between the two.
    seconds = {"quick": iter([9, 1, 1, 3, 3, 1]), "slow": iter([9, 2, 2, 6, 6, 6])}

    def model(name):
        calls = itertools.count()

        def call(images):
            if next(calls) % 2:
                clock[0] += next(seconds[name]) / 1000

        return call

    quick, slow = paired_latency_ms([model("quick"), model("slow")], (3, 8, 8), repeats=5)
    assert (quick, slow) == pytest.approx((7 / 3, 14 / 3))


def test_the_metadata_is_json_that_any_reader_of_onnx_finds(file):
    metadata = {each.key: each.value for each in onnx.load(file).metadata_props}
    assert set(metadata) == {"format", "description", "sha256"}
    description = json.loads(metadata["description"])
    assert (description["input_shape"], description["mean"], description["inputs"]) == ([3, 8, 8], [0.5], [])


@pytest.mark.parametrize("shape", [[3, 9, 8], [1, 8, 8]])
def test_a_description_of_other_images_than_the_graph_takes_is_refused(file, shape, tmp_path):
    model, path = onnx.load(file), tmp_path / "other.onnx"
    description = json.loads({each.key: each.value for each in model.metadata_props}["description"])
    onnx_format._write(path, model, description | {"input_shape": shape})
    with pytest.raises(UserError, match=r"other\.onnx: input_shape: found .* for a network of \[3, 8, 8\]; accepted: "):
        OnnxModel.read(path)


def with_a_loop(function):
    """A model whose only operator is a loop, or a function with that loop."""
    helper = onnx.helper
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    flags = [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("go", "on")]
    step = helper.make_tensor_value_info("step", TensorProto.INT64, [])
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["x"], ["y"])],
        "body",
        [step, flags[0], values[0]],
        [flags[1], values[1]],
    )
    loop = helper.make_node("Loop", ["count", "", "start"], ["logits"], body=body)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    constants = [numpy_helper.from_array(np.int64(10**12), "count"), numpy_helper.from_array(np.ones(1, "f4"), "start")]
    functions = [helper.make_function("own", "Long", ["count", "start"], ["logits"], [loop], opsets)]
    node = helper.make_node("Long", ["count", "start"], ["logits"], domain="own") if function else loop
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1])
    graph = helper.make_graph([node], "graph", [], [output], constants)
    return helper.make_model(graph, opset_imports=opsets, functions=functions if function else [], ir_version=9)


@pytest.mark.parametrize("function", [False, True])
def test_a_file_with_a_loop_is_refused_before_it_could_run(function, tmp_path):
    path = tmp_path / "loop.onnx"
    path.write_bytes(with_a_loop(function).SerializeToString())
    with pytest.raises(UserError, match="loops"):
        OnnxModel.read(path)


def as_varint(number):
    low, high = number & 127, number >> 7
    return bytes([low]) if not high else bytes([low | 128]) + as_varint(high)


@pytest.mark.parametrize(("function", "field", "number"), [(False, "graph", 7), (True, "functions", 25)])
def test_a_loop_that_runtimes_alone_would_see_is_refused(function, field, number, tmp_path):
    model = with_a_loop(function)
    hidden = (model.functions[0] if function else model.graph).SerializeToString()
    model.ClearField(field)
    tag = number << 3 | 2 | 1 << 32  # whose upper bits the runtimes drop
    content = model.SerializeToString() + as_varint(tag) + as_varint(len(hidden)) + hidden
    path = tmp_path / "loop.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match="truncated file or none of the ONNX format"):
        OnnxModel.read(path)


@pytest.mark.parametrize("constant", [False, True])
def test_tensors_in_another_file_are_refused(constant, tmp_path):
    (tmp_path / "weights.bin").write_bytes(bytes(48))
    tensor = numpy_helper.from_array(np.zeros((4, 3), "f4"), "weight")
    onnx.external_data_helper.set_external_data(tensor, "weights.bin")
    tensor.ClearField("raw_data")
    helper = onnx.helper
    nodes = [helper.make_node("Constant", [], ["weight"], value=tensor)] if constant else []
    nodes.append(helper.make_node("MatMul", ["images", "weight"], ["logits"]))
    ports = [helper.make_tensor_value_info(*port) for port in (("images", 1, [1, 4]), ("logits", 1, [1, 3]))]
    graph = helper.make_graph(nodes, "graph", ports[:1], ports[1:], [] if constant else [tensor])
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph, ir_version=9).SerializeToString())
    with pytest.raises(UserError, match=r"model\.onnx: found tensors in another file"):
        OnnxModel.read(path)
