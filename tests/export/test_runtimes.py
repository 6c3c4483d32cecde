"""A trained network in every runtime that is installed: its classes, its rows, `--verify`, and pictures with its files.

What each format holds of a network is tested beside this, a file for each.
"""

import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from networks import digits, distance, logits
from PIL import Image

import compress
from compress.cli import main
from compress.export.formats import exporter_called, files_of
from compress.predict import Predictor
from compress.results.record import Record

TRAINED = ["student=resnet8", "trainer.max_epochs=4", "logger=none"]
RUNTIMES = [
    name
    for name in ("onnx", "openvino", "executorch", "litert")
    if all(find_spec(package) for package in exporter_called(name).packages)
]
# Of the logits of a network whose inputs are on grids; ONNX Runtime rounds those of additions, too.
FURTHEST = {"onnx": 0.15, "openvino": 0.05, "executorch": 0.02, "litert": 0.02}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directories of a trained network, of the same trained on grids of 8 bits, and of its weights quantized."""
    folder = tmp_path_factory.mktemp("runs")
    every, start = f"export=[{','.join(RUNTIMES)}]", f"student.checkpoint={folder}/post/models/student-fp32.safetensors"
    floats = ",".join(name for name in RUNTIMES if name != "executorch")  # which takes no weights without inputs
    post = [every, "method=supervised", "quantizer.bits=[8]", "quantizer.rates=[4]", "quantizer.activation_bits=8"]
    trained = [every, "method=qat", "teacher=none", "method.weight_bits=8", "method.activation_bits=8", start]
    weights = [f"export=[{floats}]", "method=supervised", "trainer.max_epochs=1", start, "quantizer.bits=[8,4]"]
    for name, overrides in (("post", post), ("trained", trained), ("weights", weights)):
        assert main([*TRAINED, *overrides, f"hydra.run.dir={folder}/{name}"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "furthest"),
    [
        ("post/models/student-fp32", 1e-5),
        ("post/models/student-gpfq-8bit-a8", None),
        ("post/models/student-gpfq-4.0bpw-a8", None),
        ("trained/models/student-lsq-w8a8", None),
        ("weights/models/student-gpfq-8bit", 1e-5),
        ("weights/models/student-gpfq-4bit", 1e-5),
    ],
)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_trained_network_has_its_classes(runs, file, furthest, runtime):
    if runtime == "executorch" and file.startswith("weights"):
        assert not (runs / f"{file}.pte").exists()
        return
    network, _ = compress.load(runs / f"{file}.safetensors")
    found, about = compress.load(runs / f"{file}{exporter_called(runtime).suffix}")
    images = digits()
    expected, computed = logits(network, images), found(images)
    assert distance(computed, expected) < (furthest or FURTHEST[runtime])
    assert (computed.argmax(1) == expected.argmax(1)).double().mean() >= 0.99
    assert about["class_names"] == [str(digit) for digit in range(10)]


@pytest.mark.slow
def test_every_file_is_a_row_beside_the_float_network_in_the_same_runtime(runs):
    record = Record.read(runs / "post" / "result.json")
    names = [exporter_called(name).runtime for name in RUNTIMES]
    variants = ("fp32", "gpfq 8 bit a8", "gpfq 4.0 bits/weight a8")
    assert [row.name for row in record.rows] == [
        name for variant in variants for name in (variant, *(f"{variant} {runtime}" for runtime in names))
    ]
    assert list(record.runtimes) == ["torch", *names]
    rows = {row.name: row for row in record.rows}
    packed = rows["gpfq 8 bit a8"]
    for runtime in names:
        reference, row = rows[f"fp32 {runtime}"], rows[f"gpfq 8 bit a8 {runtime}"]
        assert row.bytes == (runs / "post" / row.file).stat().st_size
        assert row.runtime_agreement >= 0.99
        assert abs(row.test_accuracy - packed.test_accuracy) <= 0.01
        assert reference.speedup is None
        assert row.speedup == pytest.approx(reference.latency_ms / row.latency_ms)
        assert row.speedup_32 == pytest.approx(reference.latency_32_ms / row.latency_32_ms)
    assert packed.speedup is None


@pytest.mark.slow
def test_the_runtimes_say_in_what_they_compute(runs):
    record = Record.read(runs / "post" / "result.json")
    if "openvino" in RUNTIMES:
        assert record.runtimes["openvino"].accuracy_precision == "f32"
        assert record.runtimes["openvino"].latency_precision in ("f32", "bf16", "f16")
    capabilities = torch.cpu.get_capabilities()
    assert record.hardware.features == sorted(name for name, present in capabilities.items() if present is True)


@pytest.mark.slow
def test_the_files_of_a_run_are_verified_in_their_runtimes(runs, capsys):
    assert main(["--verify", str(runs / "post")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for name in RUNTIMES:
        assert f"student-gpfq-8bit-a8{exporter_called(name).suffix}: bytes, hashes and accuracy" in said


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_pictures_are_classified_with_the_files_of_a_network_alone(runs, tmp_path, runtime):
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (20, 20), np.uint8)).save(tmp_path / "grey.png")
    suffix = exporter_called(runtime).suffix
    written = runs / f"post/models/student-fp32{suffix}"
    for file in files_of(written):
        shutil.copy(file, tmp_path / file.name.replace("student-fp32", "net"))
    [found] = Predictor.read(tmp_path / f"net{suffix}")([tmp_path / "grey.png"], top=10)
    [expected] = Predictor.read(runs / "post/models/student-fp32.safetensors")([tmp_path / "grey.png"], top=10)
    assert found.classes == expected.classes
    assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-4)
