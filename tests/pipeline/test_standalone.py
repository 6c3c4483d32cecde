"""Quantizing a checkpoint without training, and the files that export writes."""

import csv
import json
import os
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import Script
from safetensors.torch import save_file

import compress
from compress import models, yaml_file
from compress.benchmarks import nncodec, quantizer_study
from compress.benchmarks.quantizer_study import measure
from compress.cli import main
from compress.config.compose import compose_jobs
from compress.config.values import check_values
from compress.errors import UserError
from compress.export.onnx import OnnxModel
from compress.export.packed import read_model
from compress.export.weights import load_weights
from compress.pipeline.standalone import quantize_checkpoint
from compress.report.collect import collect

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "quantize.py"
SMALL = [
    "experiment=quickstart",
    "method=supervised",
    "student=resnet8",
    "trainer.max_epochs=3",
    "data.limit=400",
    "quantizer.calibration_images=64",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small finished run whose variants were exported as ONNX files too; its folder is the working directory."""
    folder = tmp_path_factory.mktemp("standalone")
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield compress.run([*SMALL, "export=onnx", "quantizer.bits=[8,2]", "quantizer.activation_bits=8"])
    finally:
        os.chdir(before)


def rows_of(directory):
    with (directory / "tradeoff.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_onnx_files_are_rows_that_agree_with_torch(run):
    rows = rows_of(run.directory)
    assert [(row["runtime"], row["bits"]) for row in rows] == [
        ("torch", "32"),
        ("onnxruntime", "32"),
        ("torch", "8"),
        ("onnxruntime", "8"),
        ("torch", "2"),
        ("onnxruntime", "2"),
    ]
    for row in rows:
        assert int(row["bytes"]) == (run.directory / row["file"]).stat().st_size
        assert float(row["latency_ms"]) > 0
        assert float(row["latency_32_ms"]) > 0
        if row["runtime"] == "torch":
            assert row["runtime_agreement"] == row["logit_difference"] == ""
        else:
            # After three epochs many images lie between two classes.
            assert float(row["runtime_agreement"]) >= 0.95
            assert OnnxModel.read(run.directory / row["file"]).description["architecture"]["stem"] == "resnet8"
    assert float(rows[1]["logit_difference"]) < 1e-4


def test_a_model_file_of_a_run_is_quantized_as_the_run_itself_did(run, capsys):
    path = run.directory / "models" / "student-fp32.safetensors"
    options = ["quantizer=gpfq", "quantizer.bits=[2]", "quantizer.activation_bits=8", "quantizer.calibration_images=64"]
    directory = quantize_checkpoint([f"checkpoint={path}", *options])
    assert directory.parent == Path("outputs/quantized")
    mine, its = (
        read_model(folder / "models" / "student-gpfq-2bit-a8.safetensors")[0].state_dict()
        for folder in (directory, run.directory)
    )
    assert mine.keys() == its.keys()
    assert all(torch.equal(value, its[name]) for name, value in mine.items())
    rows = rows_of(directory)
    assert [row["test_accuracy"] for row in rows] == [
        rows_of(run.directory)[index]["test_accuracy"] for index in (0, 4)
    ]
    record = json.loads((directory / "result.json").read_text())
    assert record["student"]["checkpoint"] == str(path)
    assert record["layers"]["student-gpfq-2bit-a8.safetensors"]["quantized"]["conv1"]["bits"] == 8
    for name in ("tradeoff.png", "layers.png", "weights.png"):
        with Image.open(directory / name) as picture:
            assert min(picture.size) > 300
    assert "gpfq 2 bit a8" in capsys.readouterr().out


def test_a_tuned_network_has_the_codes_of_the_one_that_is_not_and_other_numbers(run):
    path = run.directory / "models" / "student-fp32.safetensors"
    options = ["quantizer.bits=[2]", "quantizer.activation_bits=8", "quantizer.calibration_images=64"]
    tune = {"images": 128, "epochs": 3, "learning_rate": 3e-3, "batch_size": 32, "seed": 0}
    typed = "quantizer.tune={images: 128, batch_size: 32}"
    directory = quantize_checkpoint([f"checkpoint={path}", *options, typed, "export=[packed,onnx]"])
    mine, its = (
        read_model(folder / "models" / "student-gpfq-2bit-a8.safetensors")[0].state_dict()
        for folder in (directory, run.directory)
    )
    assert not torch.equal(mine["fc.bias"], its["fc.bias"])
    assert torch.equal(mine["fc.weight"].sign(), its["fc.weight"].sign())
    assert not torch.equal(mine["fc.weight"], its["fc.weight"])
    rows = rows_of(directory)
    assert [row["runtime"] for row in rows] == ["torch", "onnxruntime"] * 2
    assert float(rows[-1]["runtime_agreement"]) >= 0.95
    assert yaml_file.read(directory / "config.yaml")["quantizer"]["tune"] == tune


def test_a_checkpoint_of_a_run_and_a_plain_state_dict_are_quantized_too(run, tmp_path):
    options = ["quantizer=rtn", "quantizer.bits=4", "export=none"]
    first = quantize_checkpoint([f"checkpoint={run.directory / 'checkpoints' / 'best.ckpt'}", *options])
    assert [row["file"] for row in rows_of(first)] == ["", ""]
    assert not (first / "models").exists()
    network = models.build("resnet8", 10)
    load_weights(network, run.directory / "checkpoints" / "best.ckpt")
    foreign = tmp_path / "weights.pt"
    torch.save(network.state_dict(), foreign)
    second = quantize_checkpoint([f"checkpoint={foreign}", "model=resnet8", "data.limit=400", *options])
    for one, other in zip(rows_of(first), rows_of(second), strict=True):
        assert [one[key] for key in ("test_accuracy", "agreement")] == [
            other[key] for key in ("test_accuracy", "agreement")
        ]
        # The checksums of two configurations are compressed to a few bytes more or less.
        assert int(one["bytes"]) == pytest.approx(int(other["bytes"]), abs=20)


def test_verify_reads_a_quantized_checkpoint_again(run, capsys):
    path = run.directory / "models" / "student-fp32.safetensors"
    directory = quantize_checkpoint([f"checkpoint={path}", "quantizer=rtn", "quantizer.bits=[8]", "export=onnx"])
    capsys.readouterr()
    assert main(["--verify", str(directory)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[1].rstrip(":") for line in lines[:-1]) == sorted(
        str(path) for path in directory.rglob("*") if path.is_file()
    )
    assert sum("bytes, hashes and accuracy" in line for line in lines) == 4
    for name, count in (("models/student-rtn-8bit.onnx", 1), ("config.yaml", 5)):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert main(["--verify", str(directory)]) == 1
        damaged = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged")]
        assert damaged[0].split()[1] == f"{directory / name}:"
        # Without the configuration there are no data to evaluate a model on.
        assert len(damaged) == count
        (directory / name).write_bytes(content)


def test_a_budget_holds_for_the_file_of_a_run(run):
    path = run.directory / "models" / "student-fp32.safetensors"
    directory = quantize_checkpoint([f"checkpoint={path}", "quantizer.budget=45kB"])
    _, coded = rows_of(directory)
    columns = (coded["levels"], coded["first_last_bits"], coded["file"])
    assert columns == ("", "", "models/student-gpfq-budget.safetensors")
    assert 44_550 <= int(coded["bytes"]) <= 45_000
    layers = json.loads((directory / "result.json").read_text())["layers"]["student-gpfq-budget.safetensors"]
    assert len({layer["bits"] for layer in layers["quantized"].values()}) > 1
    assert all(layer["sensitivity"] > 0 for layer in layers["quantized"].values())


def test_networks_without_some_channels_or_weights_are_quantized_as_they_are(run):
    shrunk = compress.run([*SMALL[:-1], "pruning=structured", "pruning.ratio=0.5", "quantizer=none"])
    file = shrunk.directory / shrunk.rows[0].file
    whole, _ = rows_of(quantize_checkpoint([f"checkpoint={file}", "quantizer.bits=4"]))
    assert float(whole["test_accuracy"]) == pytest.approx(shrunk.rows[0].test_accuracy, abs=1e-6)
    assert int(whole["macs"]) < run.rows[0].macs / 3
    masked = compress.run(
        [*SMALL[:-1], "pruning=magnitude", "pruning.sparsity=0.9", "pruning.when=start", "quantizer=none"]
    )
    # Less than a network of as many layers takes that was not pruned.
    file = masked.directory / masked.rows[0].file
    _, packed = rows_of(quantize_checkpoint([f"checkpoint={file}", "quantizer.budget=15kB"]))
    assert int(packed["bytes"]) <= 15_000
    assert float(packed["sparsity"]) >= 0.89


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "checkpoint: found none"),
        (["checkpoint=nowhere.pt"], "checkpoint: found no file at nowhere.pt"),
        (["checkpoint={state}"], "model: found none, and .*state.safetensors does not say it; accepted: .*resnet8"),
        (["checkpoint={state}", "model=resnet99"], "student: found 'resnet99'; accepted"),
        (["checkpoint={state}", "model=resnet20"], "lacks"),
        (["checkpoint={run}", "method=kd"], "method=kd: nothing is trained here; accepted"),
        (["checkpoint={run}", "quantiser=gptq"], "quantiser: found an unknown key; accepted: checkpoint, .*quantizer"),
        (["checkpoint={run}", "quantizer=none"], "quantizer: found none"),
        (["checkpoint={run}", "quantizer.bits=[0]"], "quantizer.bits"),
        (["checkpoint={run}", "quantizer.budget=1kB"], "the smallest file of this network has"),
        (["checkpoint={run}", "quantizer=rtn", "quantizer.max_drop=1"], "quantizer.max_drop: found 1.0 for rtn"),
        (["checkpoint={packed}"], "is a packed model and no checkpoint"),
        (["checkpoint={state}", "network=absent.MyNet"], "^network: found 'absent.MyNet', which cannot be imported"),
        (["checkpoint={state}", "network=MyNet"], "^network: found 'MyNet'; accepted: MODULE.CLASS, such as"),
        (["checkpoint={text}", "model=resnet8"], "damaged or no checkpoint"),
        (["checkpoint={truncated}"], "truncated.safetensors: found a truncated file"),
        (["checkpoint={altered}"], "altered.safetensors: found content that does not match its checksum"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(run, tmp_path, arguments, message):
    state, text = tmp_path / "state.safetensors", tmp_path / "text.pt"
    save_file({name: value.contiguous() for name, value in models.build("resnet8", 10).state_dict().items()}, state)
    text.write_text("no checkpoint")
    whole = bytearray((run.directory / "models" / "student-fp32.safetensors").read_bytes())
    (tmp_path / "truncated.safetensors").write_bytes(whole[:-1])
    whole[-1] ^= 1
    (tmp_path / "altered.safetensors").write_bytes(whole)
    files = {
        "truncated": tmp_path / "truncated.safetensors",
        "altered": tmp_path / "altered.safetensors",
        "state": state,
        "text": text,
        "run": run.directory / "models" / "student-fp32.safetensors",
        "packed": run.directory / "models" / "student-gpfq-2bit-a8.safetensors",
    }
    before = sorted(Path("outputs").rglob("*.*"))
    with pytest.raises(UserError, match=message) as mistake:
        quantize_checkpoint([each.format(**files) for each in arguments])
    assert "\n" not in str(mistake.value)
    assert sorted(Path("outputs").rglob("*.*")) == before


def test_the_script_says_what_it_takes_and_exits_with_2(tmp_path):
    asked = Script(SCRIPT, "--help", folder=tmp_path)
    out, error = asked.said()
    assert (asked.wait(), error) == (0, "")
    assert "checkpoint=FILE" in out
    wrong = Script(SCRIPT, "checkpoint=x.pt", folder=tmp_path)
    assert wrong.said() == ["", "error: checkpoint: found no file at x.pt; accepted: a checkpoint or model file\n"]
    assert wrong.wait() == 2
    assert {path.suffix for path in tmp_path.iterdir()} == {".out", ".err"}


def test_every_option_of_the_study_can_be_composed():
    for options in (quantizer_study.MAIN | quantizer_study.COMPARED).values():
        [job] = compose_jobs(options)
        check_values(job.config)


def test_the_study_measures_the_networks_of_runs_and_goes_on_where_it_was(run, tmp_path, monkeypatch, capsys):
    one_rate = {
        name: ["quantizer.rates=[2]" if word.startswith("quantizer.rates=") else word for word in options]
        for name, options in quantizer_study.MAIN.items()
    }
    monkeypatch.setattr(quantizer_study, "MAIN", one_rate)

    def study(*arguments):
        monkeypatch.setattr(sys, "argv", ["quantizer_study.py", str(tmp_path / "study"), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT.with_name("quantizer_study.py")), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    monkeypatch.setitem(sys.modules, "nncodec", None)  # cannot be imported
    code, _, said = study(run.directory)
    assert code == 0
    assert re.fullmatch(r"nncodec: not measured, because it cannot be imported \(.*nncodec.*\)\n", said)
    path = tmp_path / "study" / "quantizers.json"
    measured = json.loads(path.read_text())
    del measured["sha256"]
    [known] = measured["resnet8"].values()
    assert set(known) == set(one_rate)
    assert [row["bits"] for row in known["gpfq"]["rows"]] == [8, 4, 3, 2]
    uniform, coded = known["gpfq"]["rows"][2], known["gpfq, budget"]["rows"][0]
    assert coded["bytes"] <= uniform["bytes"]
    assert known["gpfq"]["float"]["test_accuracy"] == run.rows[0].test_accuracy
    # Another seed's figures, so that there is a mean and a deviation.
    measured["resnet8"]["1"] = json.loads(
        json.dumps(known).replace('"test_accuracy": ', '"test_accuracy": 0.5, "was": ')
    )
    path.write_text(json.dumps(measured))
    code, output, _ = study(run.directory)
    assert (code, output) == (0, (tmp_path / "study" / "quantizers.md").read_text() + "\n")
    change = 100 * (uniform["test_accuracy"] - run.rows[0].test_accuracy) / 2
    [line] = [line for line in output.splitlines() if line.startswith("| gpfq | 3 |")]
    assert f"| {change:+.2f} ± {abs(change) * 2**0.5:.2f} |" in line
    kinds = ["fixed widths", "rates", "rates, 8 survivors", "rates, 8 survivors, tuned", "rates, coupled rows"]
    kinds.append("rates, tuned")
    assert f"| drop, points | {' | '.join(f'{kind}, kB' for kind in kinds)} |\n" in output
    code, _, said = study(tmp_path)
    assert (code, said) == (2, f"error: {tmp_path}: found no finished run; accepted: directories with a result.json\n")


# The package is no dependency of the project.
if find_spec("nncodec"):

    def test_the_iso_codec_gives_a_smaller_network_that_classifies_alike(run):
        known, saved = {}, []
        measure(run.directory, {}, known, lambda: saved.append(list(known)), coded={"fine": -38, "coarse": 0})
        assert saved == [["fine"], ["fine", "coarse"]]
        [fine], [coarse] = known["fine"]["rows"], known["coarse"]["rows"]
        whole = run.rows[0]
        assert coarse["bytes"] < fine["bytes"] < whole.bytes
        assert abs(fine["test_accuracy"] - whole.test_accuracy) < 0.02
        assert coarse["test_accuracy"] < whole.test_accuracy - 0.1
        network, _ = read_model(run.directory / "models" / "student-fp32.safetensors")
        decoded, size = nncodec.coded(network, -38)
        assert size == fine["bytes"]
        for name, value in network.state_dict().items():
            # The step of weights is 6 / 2^12, the others' is finer, and fewer bits are worth a step or two.
            assert (decoded.state_dict()[name] - value).abs().max() <= 3 * 6 / 2**12
        assert not torch.equal(decoded.state_dict()["conv1.weight"], network.state_dict()["conv1.weight"])


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["trainer.accelerator=gpu"], "trainer.accelerator: found 'gpu' but no usable GPU"),
        (["export=onnx", "quantizer.grid.alphabet=published", "quantizer.bits=[16]"], "export: found"),
    ],
)
def test_what_could_fail_late_is_refused_before_anything_is_written(run, tmp_path, monkeypatch, typed, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = run.directory / "models" / "student-fp32.safetensors"
    with pytest.raises(UserError, match=words):
        quantize_checkpoint([f"checkpoint={file}", "quantizer=rtn", f"output_directory={tmp_path}", *typed])
    assert list(tmp_path.iterdir()) == []


def test_pictures_without_labels_give_the_agreement_with_the_float_network(run, tmp_path, capsys):
    for index in range(40):
        draw = torch.Generator().manual_seed(index)
        pixels = torch.randint(0, 256, (20, 24, 3), dtype=torch.uint8, generator=draw).numpy()
        (tmp_path / "pictures" / str(index % 3)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "pictures" / str(index % 3) / f"{index}.png")
    path = run.directory / "models" / "student-fp32.safetensors"
    pictures = ["data=folder", f"data.root={tmp_path / 'pictures'}", "data.validation_fraction=0.5"]
    options = ["quantizer=gpfq", "quantizer.bits=[8,2]", *pictures]
    directory = quantize_checkpoint([f"checkpoint={path}", *options])
    whole, eight, two = rows_of(directory)
    for row in (whole, eight, two):
        assert row["validation_accuracy"] == row["test_accuracy"] == ""
    assert float(whole["agreement"]) == 1
    assert float(two["agreement"]) <= float(eight["agreement"]) <= 1
    out = capsys.readouterr().out
    assert "test %" not in out
    assert main(["--verify", str(directory)]) == 0
    assert capsys.readouterr().out.count("not evaluated, because the images have no labels") == 3
    assert "same %" in out
    record = json.loads((directory / "result.json").read_text())
    assert record["data"]["images"] == {"train": 20, "validation": 20, "test": 20}
    assert record["data"]["input_shape"] == [3, 8, 8]
    assert (directory / "tradeoff.png").exists()
    with pytest.raises(UserError, match="found no accuracy, because the images had no labels"):
        collect([directory])

    network = models.build("resnet8", 10)
    load_weights(network, path)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    foreign = [f"checkpoint={tmp_path / 'weights.pt'}", "model=resnet8", "data.image_size=8", *options]
    with pytest.raises(UserError, match=r"data\.class_names: found none"):
        quantize_checkpoint(foreign)
    (tmp_path / "names.json").write_text(json.dumps([str(digit) for digit in range(10)]))
    again = quantize_checkpoint([*foreign, f"data.class_names={tmp_path / 'names.json'}", "data.mean=[0.5]"])
    assert [row["test_accuracy"] for row in rows_of(again)] == [""] * 3
    (tmp_path / "few").write_text("a\nb")
    with pytest.raises(UserError, match=r"weights\.pt"):
        quantize_checkpoint([*foreign, f"data.class_names={tmp_path / 'few'}"])


def test_keys_of_the_model_are_taken_with_a_foreign_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(models.build("vgg8", 10).state_dict(), "weights.pth")
    options = ["data=digits", "data.limit=100", "quantizer=rtn", "quantizer.bits=[8]"]
    directory = quantize_checkpoint(["checkpoint=weights.pth", "model=vgg8", "model.dropout=0.1", *options])
    assert "dropout: 0.1" in (directory / "config.yaml").read_text()
