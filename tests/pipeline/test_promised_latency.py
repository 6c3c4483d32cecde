"""`quantizer.latency`: refused before any work where nothing keeps it, and checked on the file that a run leaves."""

import pytest
import torch

import compress
from compress import models
from compress.errors import UserError
from compress.export.description import NetworkDescription
from compress.export.onnx import Onnx
from compress.export.packed import Packed
from compress.pipeline import latency
from compress.pipeline.check import checked_jobs
from compress.quantization import QuantizedModel, Quantizer
from compress.results.record import Record

SHORT = ["student=resnet8", "method=supervised", "data.limit=200", "trainer.max_epochs=1", "logger=none"]
SHORT += ["quantizer=rtn", "quantizer.calibration_images=16", "quantizer.activation_bits=8"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["export=onnx", "quantizer.latency=1us"],
            r"quantizer\.latency: found 1us, at most 0\.001 ms, but .* ms is the least .*onnxruntime",
        ),
        (
            ["export=onnx", "quantizer.latency=1000s"],
            r"quantizer\.latency: found 1000s, which the float32 network keeps",
        ),
        (
            ["export=packed", "quantizer.latency=2x"],
            r"quantizer\.latency: found it without a runtime .*; accepted: with export=onnx",
        ),
        (
            ["export=onnx", "quantizer.latency=2y"],
            r"^quantizer\.latency: found '2y'; accepted: a time above 0, such as",
        ),
    ],
)
def test_what_cannot_be_promised_is_refused_before_any_work(overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as mistake:
        checked_jobs([*SHORT, *overrides])
    assert "\n" not in str(mistake.value)
    assert not [*tmp_path.iterdir()]


def promised(monkeypatch, tmp_path, wanted, saved):
    """The record of a run in which each layer on integers saves a share of a millisecond.

    Which layers do in truth, and how much, depends on the processor.
    """

    def figures(exporter, description, images, networks):
        return [1 - saved * len(network.layers if isinstance(network, QuantizedModel) else ()) for network in networks]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency, "_latencies_ms", figures)
    result = compress.run([*SHORT, "export=onnx", f"quantizer.latency={wanted}"])
    return Record.read(result.directory / "result.json")


@pytest.mark.slow
def test_a_run_leaves_one_file_with_layers_in_float_and_says_what_it_takes(tmp_path, monkeypatch, capsys):
    record = promised(monkeypatch, tmp_path, "1.5x", 0.1)
    found = record.latency
    [row] = [row for row in record.rows if row.runtime == "onnxruntime" and row.quantizer == "rtn"]
    assert row.file == "models/student-rtn-latency-a8.onnx"
    assert (found.runtime, found.wanted, found.measured_ms) == ("onnxruntime", "1.5x", row.latency_ms)
    assert found.kept == (row.latency_ms <= found.limit_ms) == (row.speedup >= 1.5)
    said = " ".join(capsys.readouterr().out.split())
    assert ("quantizer.latency: 1.5x was not kept" in said) == (not found.kept)
    layers = record.layers["student-rtn-latency-a8.safetensors"]
    assert len(layers.quantized) == 4
    assert found.saved_ms.keys() == layers.quantized.keys() | layers.skipped.keys()
    assert {*layers.skipped.values()} == {"latency: float, for 1.5x"}
    [card] = tmp_path.glob("outputs/runs/*/README.md")
    assert f"Float for it: {', '.join(layers.skipped)}." in card.read_text()


@pytest.mark.slow
def test_a_promise_that_the_file_does_not_keep_is_said(tmp_path, monkeypatch, capsys):
    """No file takes a picosecond, whatever the clock of the search has said."""
    record = promised(monkeypatch, tmp_path, "0.000001us", 1.0)
    assert not record.latency.kept
    assert record.latency.measured_ms > record.latency.limit_ms == 1e-9
    assert "note: quantizer.latency: 0.000001us was not kept" in " ".join(capsys.readouterr().out.split())
    [card] = tmp_path.glob("outputs/runs/*/README.md")
    assert "onnxruntime, which it does not keep with" in card.read_text()


@pytest.mark.slow
def test_networks_are_timed_as_files_of_the_runtime():
    torch.manual_seed(0)
    network, images = models.build("resnet8", 10).eval(), torch.randn(8, 3, 8, 8)
    quantized = Quantizer(bits=[8], activation_bits=8)(network, [images], 8)
    architecture = {"stem": "resnet8", "options": {}, "num_classes": 10}
    description = NetworkDescription(architecture, [*"0123456789"], [0.5], [0.5], (3, 8, 8))
    runtime = latency.runtime_of([Packed(), Onnx()], description, images)
    assert runtime.name == "onnxruntime"
    assert all(0 < milliseconds < 1000 for milliseconds in runtime.latencies_ms([network, quantized, network]))
