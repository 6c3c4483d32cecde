"""The comparison with other libraries, but for what needs them: this project's rows, the table and the refusals."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import compress
from compress.benchmarks.peer_comparison import measure, opened, tables
from compress.benchmarks.peers import ours, torchao
from compress.evaluation import evaluate

SCRIPT = Path(__file__).parents[2] / "scripts" / "comparison.py"
SHORT = ["method=supervised", "student=resnet8", "data.limit=300", "trainer.max_epochs=1", "trainer.log_every=0"]


@pytest.fixture
def compare(monkeypatch, capsys):
    """Runs the script with some arguments and gives its exit code and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["comparison.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return ended.value.code, capsys.readouterr().err

    return run


@pytest.mark.slow
def test_a_row_has_the_accuracy_and_the_bytes_of_what_was_written(tmp_path, monkeypatch):
    run = compress.run([*SHORT, "quantizer=none", "trainer.accelerator=cpu", f"output_directory={tmp_path}"]).directory
    chosen = ("gpfq, `export=packed`", "gpfq, `export=onnx`", "gpfq, `bits=4`")
    settings = {name: setting for name, setting in ours.settings().items() if name in chosen}
    monkeypatch.setattr(ours, "settings", lambda: settings)
    known, saved = {}, []
    measure(run, "ours", known, lambda: saved.append(len(known["rows"]["ours"])), turns=2)
    assert saved == [1, 2, 3]
    rows = known["rows"]["ours"]
    data, network, images = opened(run)
    assert len(images) == len(data.splits["train"])
    expected = ours.quantized(network, images, 4)
    size = expected.save(tmp_path / "again.safetensors")
    accuracy = evaluate(expected.network, data.test_dataloader(), data.num_classes).accuracy
    assert rows["gpfq, `bits=4`"]["files"] == {"model.safetensors": size}
    assert rows["gpfq, `bits=4`"]["test_accuracy"] == accuracy
    # One quantization for both files, timed twice in turn with the gauge.
    first, second = (rows[name] for name in chosen[:2])
    assert first["seconds"] == second["seconds"]
    assert all(len(row["seconds"]) == len(row["gauge_seconds"]) == 2 for row in rows.values())
    # What is there already is not quantized again.
    monkeypatch.setattr(ours, "quantized", None)
    measure(run, "ours", known, lambda: saved.append("again"))
    assert saved == [1, 2, 3]


def row(accuracy, weights, inputs=None, seconds=(4.0, 8.0, 30.0), **files):
    return {
        "weights": weights,
        "inputs": inputs,
        "test_accuracy": accuracy,
        "files": files,
        "seconds": list(seconds),
        "gauge_seconds": [2.0, 2.0, 10.0],
        "file": ".xml and .bin",
        "runs": "openvino",
    }


def test_the_tables_have_changes_and_all_bytes_with_the_widest_weights_first():
    rows = {"narrow": row(0.9, 2, bin=20_000), "wide": row(0.921, 8, 8, xml=1_500, bin=40_000), "also": row(0.92, 8)}
    text = tables(
        {"resnet20": {"float": 0.92, "rows": {"nncf": rows, "aimet": {"other": row(0.91, 2, 8, onnx=30_000)}}}}
    )
    assert text.startswith("resnet20, fp32 92.00 % on the test set\n\nWeights of 8 bits:\n\n| by | setting |")
    assert [line for line in text.splitlines() if line.startswith(("Weights", "| nncf", "| aimet"))] == [
        "Weights of 8 bits:",
        "| nncf | also | float | 92.00 | +0.00 | 0.0 | 8.0 | 3.00 | .xml and .bin: openvino |",
        "Weights and inputs of 8 bits:",
        "| nncf | wide | 8 | 92.10 | +0.10 | 41.5 | 8.0 | 3.00 | .xml and .bin: openvino |",
        "Weights of 2 bits:",
        "| nncf | narrow | float | 90.00 | -2.00 | 20.0 | 8.0 | 3.00 | .xml and .bin: openvino |",
        "| aimet | other | 8 | 91.00 | -1.00 | 30.0 | 8.0 | 3.00 | .xml and .bin: openvino |",
    ]


@pytest.mark.parametrize(
    ("peer", "package"),
    [
        ("brevitas", "onnxoptimizer"),
        ("nncf", "nncf"),
        ("aimet", "aimet_torch"),
        ("mct", "model_compression_toolkit"),
        ("torchao", "torchao"),
    ],
)
def test_a_library_that_is_missing_is_named_with_the_command_that_installs_it(
    compare, uninstall, tmp_path, peer, package
):
    uninstall(package)
    code, errors = compare(tmp_path / "output", tmp_path, "--peers", peer)
    assert code == 2
    [line] = errors.splitlines()
    assert line.startswith(f"error: {peer}: found no {package}")
    assert "accepted: pip install " in line
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_a_program_of_torchao_computes_what_was_quantized_from_images_in_any_layout(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)
    ).eval()
    images = torch.randn(40, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    [setting] = torchao.settings().values()
    with torch.no_grad():
        result = setting.quantize(network, images)
        expected, original = result[0](images[:32]), network(images[:32])
    setting.write(result, tmp_path)
    logits = setting.read(tmp_path, network)(images)
    torch.testing.assert_close(logits[:32], expected, rtol=0, atol=0.02)
    assert not torch.equal(expected, original)


def test_a_directory_without_a_finished_run_is_refused(compare, tmp_path):
    code, errors = compare(tmp_path / "output", tmp_path)
    assert (code, errors) == (
        2,
        f"error: {tmp_path}: found no finished run; accepted: directories with a result.json\n",
    )
    assert not (tmp_path / "output").exists()
