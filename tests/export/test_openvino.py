"""Files for OpenVINO: trained networks keep their classes in it, on integers that it has, from one file alone."""

import json
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec

import numpy as np
import onnx
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

from compress.cpu import sums_hold
from compress.errors import UserError
from compress.export import openvino
from compress.export.onnx import Onnx
from compress.export.onnx_file import Containers
from compress.export.openvino import OpenVino
from compress.quantization import Options, quantize
from compress.quantization.rates import RateQuantization


@pytest.fixture(scope="module")
def small():
    return make("resnet8")


def kernels(path):
    """How many layers of each kind OpenVINO computes in each type."""
    infos = [node.get_rt_info() for node in OpenVino().read(path)[0]._compiled.get_runtime_model().get_ops()]
    kinds = [(info["layerType"].astype(str), info["runtimePrecision"].astype(str)) for info in infos]
    return Counter(kind for kind in kinds if kind[0] in ("Convolution", "FullyConnected"))


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "levels"), [(8, 256), (4, 256), (2, 256), (8, 64), (4, 16)])
def test_weights_beside_quantized_inputs_are_steps_from_zero_in_int8_kernels(small, bits, levels, tmp_path):
    quantized = with_inputs(quantize(small, [IMAGES], bits, first_last_bits=None), levels)
    path = tmp_path / "model.openvino.onnx"
    OpenVino().write(path, quantized, describe("resnet8"), [IMAGES])
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    for name, layer in quantized.layers.items():
        codes = stored[f"{name}.weight.codes"]
        assert codes.data_type == TensorProto.INT8
        assert not numpy_helper.to_array(stored[f"{name}.weight.zero_point"]).any()
        values = numpy_helper.to_array(codes) * layer.grid.scale.numpy().reshape(-1, *[1] * (layer.codes.dim() - 1))
        assert np.array_equal(values.astype(np.float32), layer.grid.dequantize(layer.codes).numpy())
    # One code that is rounded the other way moves codes of all later layers.
    unrounded = logits(quantize(small, [IMAGES], bits, first_last_bits=None).model)
    expected = logits(quantized.model)
    assert distance(OpenVino().read(path)[0](IMAGES), expected) < 2 * distance(unrounded, expected)
    if sums_hold() and torch.cpu.get_capabilities().get("architecture") == "x86_64":
        assert kernels(path) == {("Convolution", "u8"): 9, ("FullyConnected", "u8"): 1}


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "kind"), [(8, TensorProto.INT8), (4, TensorProto.INT4), (2, TensorProto.INT4)])
def test_weights_alone_are_in_the_narrowest_type_that_openvino_has(small, bits, kind, tmp_path):
    quantized = quantize(small, [IMAGES], bits, first_last_bits=None)
    path = tmp_path / "model.openvino.onnx"
    OpenVino().write(path, quantized, describe("resnet8"))
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert {stored[f"{name}.weight.codes"] for name in quantized.layers} == {kind}
    model, _ = OpenVino().read(path)
    for count in (32, 1, 7):
        assert distance(model(IMAGES[:count]), logits(quantized.model, IMAGES[:count])) < 1e-5
    if find_spec("onnxruntime"):  # which reads the same file, and is no part of the extra
        (tmp_path / "model.onnx").write_bytes(path.read_bytes())
        assert distance(Onnx().read(tmp_path / "model.onnx")[0](IMAGES), logits(quantized.model)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_a_network_of_a_rate_is_held_whatever_its_codes(small, activation_bits, tmp_path):
    quantized = RateQuantization(Options(activation_bits=activation_bits), small, [IMAGES])(7.0)
    assert max(layer.grid.levels for layer in quantized.layers.values()) > 256
    path = tmp_path / "model.openvino.onnx"
    OpenVino().write(path, quantized, describe("resnet8"), [IMAGES])
    limit = 1e-4 if activation_bits is None else 0.1
    assert distance(OpenVino().read(path)[0](IMAGES), logits(quantized.model)) < limit


@pytest.mark.slow
def test_zero_points_that_no_int8_can_do_without_are_computed_rightly(small, tmp_path):
    quantized = with_inputs(quantize(small, [IMAGES], 8, grid={"zero_point": "affine"}))
    path = tmp_path / "model.openvino.onnx"
    OpenVino().write(path, quantized, describe("resnet8"), [IMAGES])
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    assert any(stored[f"{name}.weight.zero_point"].any() for name in quantized.layers)
    assert distance(OpenVino().read(path)[0](IMAGES), logits(quantized.model)) < 0.05


def test_biases_and_additions_are_not_rounded(tmp_path):
    torch.manual_seed(0)
    quantized = with_inputs(quantize(LateReader(), [IMAGES], 8))
    OpenVino().write(tmp_path / "a.openvino.onnx", quantized, describe("late", 8), [IMAGES])
    OpenVino().write(tmp_path / "b.openvino.onnx", quantized, describe("late", 8))
    assert (tmp_path / "a.openvino.onnx").read_bytes() == (tmp_path / "b.openvino.onnx").read_bytes()
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "a.openvino.onnx").graph.initializer}
    for name in quantized.layers:
        bias = quantized.model.get_submodule(name).bias.detach().numpy()
        assert np.array_equal(numpy_helper.to_array(stored[f"{name}.bias"]), bias)
    # A lone code may be rounded the other way.
    found = OpenVino().read(tmp_path / "a.openvino.onnx")[0](IMAGES)
    assert (found - logits(quantized.model)).abs().median() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("network", [TokenMixer, Repeater, LateReader])
def test_networks_of_other_shapes_have_their_logits(network, inputs, tmp_path):
    torch.manual_seed(0)
    quantized = quantize(network(), [IMAGES], 8, first_last_bits=None)
    if inputs:
        with_inputs(quantized)
    path = tmp_path / "model.openvino.onnx"
    OpenVino().write(path, quantized, describe("own", 8 if network is LateReader else 10), [IMAGES])
    found = OpenVino().read(path)[0](IMAGES)
    assert distance(found, logits(quantized.model)) < (0.02 if inputs else 1e-5)


@pytest.mark.parametrize("exact_sums", sorted({sums_hold(), False}))
def test_a_processor_whose_sums_saturate_computes_in_float(exact_sums, monkeypatch, tmp_path):
    monkeypatch.setattr(openvino, "sums_hold", lambda: exact_sums)
    quantized = lone_convolution([0.01, 0.02], [0.7, -0.4])
    path = tmp_path / "model.openvino.onnx"
    OpenVino().write(path, quantized, describe("conv", 6))
    assert distance(OpenVino().read(path)[0](IMAGES), logits(quantized.model)) < 1e-3
    if not exact_sums:
        assert ("Convolution", "u8") not in kernels(path)


@pytest.fixture(scope="module")
def file(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("openvino") / "model.openvino.onnx"
    OpenVino().write(path, quantize(small, [IMAGES[:4]], 8), describe("resnet8"))
    return path


def test_files_that_are_damaged_or_foreign_are_refused_by_name(file, tmp_path):
    content = file.read_bytes()
    path = tmp_path / "bad.openvino.onnx"
    start = content.index(b"description") + 40
    foreign = onnx.load(file)
    del foreign.metadata_props[:]
    unknown = onnx.load(file)
    unknown.graph.node[0].op_type = "Unknown"
    for bad, message in [
        (b"", "truncated"),
        (content[: len(content) // 2], "truncated"),
        (content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :], "does not match its checksum"),
        (unknown.SerializeToString(), "does not match its checksum"),
        (foreign.SerializeToString(), "without a description"),
    ]:
        path.write_bytes(bad)
        with pytest.raises(UserError, match=rf"bad\.openvino\.onnx: found .*{message}.*; accepted: ") as mistake:
            OpenVino().read(path)
        assert "\n" not in str(mistake.value)
    with pytest.raises(UserError, match=r"none\.openvino\.onnx: found no such file"):
        OpenVino().read(tmp_path / "none.openvino.onnx")


def test_a_file_with_integers_that_openvino_lacks_is_refused_in_a_line(small, monkeypatch, tmp_path):
    path = tmp_path / "two.openvino.onnx"
    monkeypatch.setattr(OpenVino, "containers", Containers())
    OpenVino().write(path, quantize(small, [IMAGES[:4]], 2), describe("resnet8"))
    with pytest.raises(
        UserError,
        match=r"two\.openvino\.onnx: found a network that OpenVINO cannot load \((?!Exception|Check ).*; accepted: an ",
    ):
        OpenVino().read(path)


SIGNALLED = """
import gc, os, pathlib, signal, sys, torch
from compress.export.openvino import OpenVino
signal.signal(signal.SIGUSR1, lambda number, frame: print("handled"))
for _ in range(2):
    read = [OpenVino().read(pathlib.Path(sys.argv[1]))[0] for _ in range(2)]  # two at a time
    read[0](torch.zeros(2, 3, 8, 8))
    while read:
        del read[0]  # the first one first
        gc.collect()
        os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.slow
def test_signals_are_handled_after_networks_came_and_went(file):
    """On a CPU with AMX, OpenVINO gives a thread a stack for signals, and can leave it with one that is gone."""
    process = subprocess.run([sys.executable, "-c", SIGNALLED, str(file)], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout.split()) == (0, ["handled"] * 4), process.stderr


def test_a_missing_package_is_named_with_the_extra(small, file, uninstall, tmp_path):
    uninstall("openvino")
    message = r"^openvino is not installed; pip install 'compress\[openvino\]'$"
    for use in (
        lambda: OpenVino().check(None),
        lambda: OpenVino().write(tmp_path / "model.openvino.onnx", small, describe("resnet8")),
        lambda: OpenVino().read(file),
    ):
        with pytest.raises(UserError, match=message):
            use()
    assert not list(tmp_path.iterdir())


def test_the_metadata_are_those_of_every_onnx_file_of_ours(file):
    metadata = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert set(metadata) == {"format", "description", "sha256"}
    assert json.loads(metadata["description"])["input_shape"] == [3, 8, 8]


WATCHED = """
import multiprocessing, os, socket, sys

def note(host, *others, **more):
    with open(sys.argv[1], "a") as file:
        print(host, file=file)
    raise OSError("no network here")

socket.getaddrinfo = note
from compress.export.exporter import import_package
import_package("openvino", "openvino")
for sender in multiprocessing.active_children():
    sender.join()
"""


@pytest.mark.slow
def test_importing_it_reports_nothing_to_its_makers(tmp_path):
    """Where nobody has agreed or refused, as in a new home, it would send an event from a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "TF_BUILD", "JENKINS_URL")}
    command = [sys.executable, "-c", WATCHED, str(tmp_path / "asked")]
    subprocess.run(command, env=environment | {"HOME": str(tmp_path)}, check=True)
    assert not (tmp_path / "asked").exists()
