"""Whole runs: what they leave, that they repeat, that they resume, and that they fail where they must."""

import csv
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import Script
from pytorch_lightning import Trainer
from waiting import wait_for

import compress
from compress.cli import main
from compress.errors import UserError
from compress.evaluation import evaluate
from compress.export.packed import read_model
from compress.methods.supervised import Supervised
from compress.pipeline.check import checked_jobs
from compress.pipeline.parts import Parts
from compress.pipeline.standalone import quantize_checkpoint
from compress.quantization.post_training import quantize
from compress.results.record import Record

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "run.py"
SMALL = [
    "student=resnet8",
    "teacher=resnet8",
    "teacher.training.epochs=2",
    "trainer.max_epochs=3",
    "data.limit=300",
    "quantizer.bits=[4,2]",
    "quantizer.calibration_images=64",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One small finished run, its folder and its result."""
    folder = tmp_path_factory.mktemp("run")
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder, compress.run(SMALL)
    finally:
        os.chdir(before)


def test_a_run_leaves_everything_it_promises(finished):
    folder, result = finished
    directory = folder / result.directory
    names = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "config.yaml",
        "metrics.csv",
        "result.json",
        "tradeoff.csv",
        "tradeoff.png",
        "layers.png",
        "weights.png",
        "run.log",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "models/student-fp32.safetensors",
        "models/student-gpfq-4bit.safetensors",
        "models/student-gpfq-2bit.safetensors",
    }
    with Image.open(directory / "tradeoff.png") as picture:
        assert min(picture.size) > 500


def test_result_json_says_what_ran_and_what_came_out(finished):
    folder, result = finished
    path = folder / result.directory / "result.json"
    record = json.loads(path.read_text())
    assert Record.read(path) == result.record
    assert record["overrides"] == SMALL
    assert record["versions"]["torch"] == torch.__version__
    assert record["data"]["class_names"] == [str(digit) for digit in range(10)]
    assert record["teacher"]["trained_in_this_run"] is True
    assert record["student"]["parameters"] == 78042
    assert record["student"]["epochs"] == 3
    assert set(record["seconds"]) == {"data", "teacher", "student", "quantization"}
    per_class = record["student"]["test_accuracy_per_class"]
    assert list(per_class) == record["data"]["class_names"]
    assert all(0 <= value <= 1 for value in per_class.values())
    assert record["tradeoff"][0]["test_accuracy"] == record["student"]["test_accuracy"]


def test_the_bytes_in_the_table_are_those_of_the_files_and_their_accuracy_is_that_of_the_model_read_back(finished):
    folder, result = finished
    directory = folder / result.directory
    with (directory / "tradeoff.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["bits"] for row in rows] == ["32", "4", "2"]

    data = Parts(checked_jobs(SMALL)[0].config).data
    reference = None
    for row in rows:
        assert int(row["bytes"]) == (directory / row["file"]).stat().st_size
        assert float(row["ratio"]) == pytest.approx(int(rows[0]["bytes"]) / int(row["bytes"]), rel=1e-5)
        model, description = read_model(directory / row["file"])
        model.to(data.device)
        assert description["class_names"] == [str(digit) for digit in range(10)]
        test = evaluate(model, data.test_dataloader(), 10)
        reference = reference or test
        assert float(row["test_accuracy"]) == pytest.approx(test.accuracy, abs=1e-6)
        assert float(row["agreement"]) == pytest.approx(test.agreement(reference), abs=1e-6)
        validation = evaluate(model, data.val_dataloader(), 10)
        assert float(row["validation_accuracy"]) == pytest.approx(validation.accuracy, abs=1e-6)


def test_the_best_checkpoint_by_validation_is_the_one_that_is_reported(finished):
    folder, result = finished
    directory = folder / result.directory
    with (directory / "metrics.csv").open() as stream:
        epochs = [row for row in csv.DictReader(stream) if row["val/accuracy"]]
    accuracies = [float(row["val/accuracy"]) for row in epochs]
    assert len(accuracies) == 3
    assert result.record.student.best_epoch == 1 + accuracies.index(max(accuracies))
    assert result.rows[0].validation_accuracy == pytest.approx(max(accuracies), abs=1e-6)


def test_the_trade_off_reaches_the_logger_too(finished):
    folder, result = finished
    with (folder / result.directory / "metrics.csv").open() as stream:
        logged = [row for row in csv.DictReader(stream) if row["tradeoff/gpfq_2_bit/test_accuracy"]]
    assert float(logged[-1]["tradeoff/gpfq_2_bit/test_accuracy"]) == pytest.approx(result.rows[2].test_accuracy)
    assert float(logged[-1]["tradeoff/gpfq_2_bit/bytes"]) == result.rows[2].bytes


def test_what_a_kill_at_the_very_end_left_is_removed_by_resuming(finished):
    folder, result = finished
    left = folder / result.directory / "started.json"
    left.write_text("{}")
    assert compress.run([f"resume={result.directory}"]).rows == result.rows
    assert not left.exists()


def test_a_second_run_finds_the_teacher_and_gives_the_same_files(finished):
    folder, result = finished
    again = compress.run(SMALL)
    assert again.directory != result.directory
    assert again.record.teacher.trained_in_this_run is False
    assert again.record.student == result.record.student
    for row in result.rows:
        first, second = (folder / each.directory / row.file for each in (result, again))
        assert first.read_bytes() == second.read_bytes()


def test_another_seed_gives_another_student_of_the_same_teacher(finished):
    _, result = finished
    other = compress.run([*SMALL[:5], "seed=1", "quantizer=none"])
    assert other.record.teacher.file == result.record.teacher.file
    assert other.record.student != result.record.student
    assert [row.quantizer for row in other.rows] == ["none"]


def test_resuming_a_finished_run_shows_it_and_computes_nothing(finished, capsys, monkeypatch):
    folder, result = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / result.directory).rglob("*")}
    monkeypatch.setattr(Trainer, "fit", None)
    assert main([f"resume={result.directory}"]) == 0
    said = capsys.readouterr().out
    assert "gpfq 2 bit" in said
    assert f"results in {result.directory.relative_to(Path.cwd())}" in said.replace("\n", "")
    assert before == {path: path.stat().st_mtime_ns for path in (folder / result.directory).rglob("*")}


def test_a_run_that_was_trained_but_not_quantized_is_quantized_once_on_resuming(finished, tmp_path, monkeypatch):
    folder, result = finished
    monkeypatch.chdir(folder)
    directory = folder / result.directory
    for name in ("result.json", "tradeoff.csv", "tradeoff.png", "models/student-gpfq-2bit.safetensors"):
        (directory / name).rename(tmp_path / Path(name).name)
    assert main([f"resume={result.directory}"]) == 0
    resumed = json.loads((directory / "result.json").read_text())
    assert resumed["student"] == result.record.content()["student"]
    packed = directory / "models" / "student-gpfq-2bit.safetensors"
    assert packed.read_bytes() == (tmp_path / packed.name).read_bytes()


def test_a_resumed_run_keeps_its_configuration(finished, capsys):
    _, result = finished
    assert main([f"resume={result.directory}", "optimizer.lr=1"]) == 2
    assert "trainer.*" in capsys.readouterr().err
    assert main([f"resume={result.directory}", "trainer.foo=1"]) == 2
    assert "trainer.foo" in capsys.readouterr().err


def test_a_directory_that_is_taken_is_refused(finished, capsys):
    _, result = finished
    assert main([*SMALL, f"hydra.run.dir={result.directory}"]) == 2
    assert "resume=" in capsys.readouterr().err


def test_a_killed_run_resumed_equals_the_undisturbed_one(finished, monkeypatch):
    folder, result = finished
    directory = Path("killed")
    process = Script(SCRIPT, *SMALL, f"hydra.run.dir={directory}", folder=folder)
    # Within the second epoch of three.
    wait_for((folder / directory / "checkpoints" / "last.ckpt").exists, process.poll)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / directory / "result.json").exists()
    monkeypatch.chdir(folder)
    assert main([f"resume={directory}"]) == 0

    resumed = json.loads((folder / directory / "result.json").read_text())
    assert resumed["student"] == result.record.content()["student"]
    assert resumed["overrides"] == SMALL
    for row in result.rows:
        assert (folder / directory / row.file).read_bytes() == (folder / result.directory / row.file).read_bytes()
    with (
        (folder / directory / "metrics.csv").open() as one,
        (folder / result.directory / "metrics.csv").open() as other,
    ):
        assert list(csv.DictReader(one)) == list(csv.DictReader(other))


def test_a_failure_while_quantizing_fails_the_run(finished, monkeypatch, tmp_path):
    def broken(*arguments, **options):
        raise RuntimeError("broken solver")

    monkeypatch.setattr("compress.quantization.quantizer.quantize_with", broken)
    assert quantize is not broken
    with pytest.raises(RuntimeError, match="broken solver"):
        compress.run([*SMALL, "trainer.max_epochs=1", f"output_directory={tmp_path}"])
    assert list(tmp_path.rglob("result.json")) == []


def test_a_training_that_diverges_at_once_says_so_and_keeps_nothing(finished, tmp_path):
    options = [*SMALL, f"output_directory={tmp_path}", "quantizer=none"]
    options = [option for option in options if not option.startswith("quantizer.")]
    with pytest.raises(UserError, match=r"^teacher: .*diverged in epoch 1.*teacher\.training\.optimizer\.lr"):
        compress.run([*options, "teacher.training.optimizer.lr=1e30"])
    assert list(tmp_path.rglob("*.safetensors")) == []
    supervised = [option for option in options if not option.startswith("teacher")]
    with pytest.raises(UserError, match=r"^student: .*diverged in epoch 1.*smaller optimizer\.lr"):
        compress.run([*supervised, "method=supervised", "optimizer.lr=1e30"])
    assert list(tmp_path.rglob("result.json")) == list(tmp_path.rglob("best.ckpt")) == []


def test_a_training_that_diverges_later_goes_on_with_the_best_epoch_before(finished, tmp_path, capsys, monkeypatch):
    started = Supervised.on_train_epoch_start

    def diverge(module):
        started(module)
        if module.current_epoch == 2:
            next(module.model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(Supervised, "on_train_epoch_start", diverge)
    options = [option for option in SMALL if not option.startswith(("teacher", "trainer"))]
    options += ["method=supervised", "trainer.max_epochs=5", "quantizer=rtn", f"output_directory={tmp_path}"]
    result = compress.run(options)
    assert "diverged in epoch 3" in capsys.readouterr().out.replace("\n", " ")
    assert result.record.student.best_epoch < result.record.student.epochs == 3
    assert [row.bits for row in result.rows] == [32, 4, 2]


def test_the_dry_run_knows_about_the_size_of_the_packed_files(finished, capsys):
    _, result = finished
    before = sorted(Path("outputs/runs").iterdir())
    assert main([*SMALL, "--dry-run"]) == 0
    said = capsys.readouterr().out
    for row in result.rows[1:]:
        [kilobytes] = re.findall(rf"{row.bits} bit ([\d.]+) kB", said)
        assert float(kilobytes) == pytest.approx(row.bytes / 1000, rel=0.1)
    assert sorted(Path("outputs/runs").iterdir()) == before


def test_the_dry_run_knows_about_the_size_at_rates_and_under_a_budget(finished, tmp_path, capsys):
    _, result = finished
    options = ["quantizer.bits=[]", "quantizer.rates=[3,1.5]"]
    checkpoint = result.directory / "models" / "student-fp32.safetensors"
    quantize_checkpoint([f"checkpoint={checkpoint}", "data=digits", f"output_directory={tmp_path}", *options])
    [written] = tmp_path.glob("**/tradeoff.csv")
    rows = {row["bits"]: int(row["bytes"]) for row in csv.DictReader(written.open())}
    capsys.readouterr()
    assert main([*SMALL, "--dry-run", *options]) == 0
    said = capsys.readouterr().out
    for rate in ("3.0", "1.5"):
        [kilobytes] = re.findall(rf"{rate} bits/weight ([\d.]+) kB", said)
        assert float(kilobytes) == pytest.approx(rows[rate] / 1000, rel=0.1)
    assert main([*SMALL, "--dry-run", "quantizer.budget=30kB", "quantizer.bits=null"]) == 0
    assert "budget 30.0 kB" in capsys.readouterr().out


def test_a_given_checkpoint_is_the_teacher(finished, tmp_path):
    folder, result = finished
    given = tmp_path / "given.safetensors"
    given.write_bytes((folder / result.record.teacher.file).read_bytes())
    again = compress.run([*SMALL, "quantizer=rtn", f"teacher.checkpoint={given}"])
    assert again.record.teacher.file == str(given)
    assert again.record.student == result.record.student


def test_a_checkpoint_of_another_network_is_refused_before_anything_is_made(finished, tmp_path, capsys):
    _, result = finished
    before = sorted(Path("outputs/runs").iterdir())
    assert main([*SMALL, "teacher=resnet20", f"teacher.checkpoint={result.record.teacher.file}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: teacher.checkpoint:")
    assert sorted(Path("outputs/runs").iterdir()) == before


def test_early_stopping_and_the_loggers(finished, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    options = ["method=supervised", "teacher=none", "optimizer.lr=1e-9", "trainer.max_epochs=9"]
    options += ["trainer.early_stopping=2", "trainer.log_every=0", "quantizer=rtn", "quantizer.bits=4"]
    options = [option for option in SMALL if not option.startswith(("teacher", "trainer", "quantizer"))] + options
    result = compress.run([*options, "logger=[tensorboard,wandb]"])
    assert result.record.student.epochs < 9
    assert (result.directory / "metrics.csv").exists()
    events = EventAccumulator(str(result.directory / "tensorboard")).Reload()
    assert {"val/accuracy", "tradeoff/rtn_4_bit/test_accuracy"} <= set(events.Tags()["scalars"])
    assert list((result.directory / "wandb").glob("offline-run-*/run-*.wandb"))
    assert "epoch 1/9" not in capsys.readouterr().out


def test_a_run_that_stopped_early_and_was_moved_resumes_to_the_same_result(finished):
    options = [option for option in SMALL if not option.startswith(("teacher", "trainer", "quantizer"))]
    options += ["method=supervised", "optimizer.lr=1e-9", "trainer.max_epochs=9", "trainer.early_stopping=2"]
    first = compress.run([*options, "quantizer=rtn", "quantizer.bits=4"])
    assert first.record.student.best_epoch < first.record.student.epochs < 9
    last = torch.load(first.directory / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    assert last["epoch"] + 1 == first.record.student.epochs
    best = (first.directory / "checkpoints" / "best.ckpt").read_bytes()

    moved = first.directory.rename(first.directory.with_name("moved"))
    (moved / "result.json").unlink()
    assert main([f"resume={moved}"]) == 0
    assert Record.read(moved / "result.json").student == first.record.student
    assert (moved / "checkpoints" / "best.ckpt").read_bytes() == best


def test_a_sweep_runs_every_combination_in_a_directory_of_its_own(finished, monkeypatch):
    folder, _ = finished
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    assert main(["-m", "method=kd,dkd", *SMALL[:5], "quantizer=none"]) == 0
    records = sorted((folder / "outputs" / "sweeps").glob("*/*/result.json"))
    assert [path.parent.name for path in records] == ["0", "1"]
    configs = [(path.parent / "config.yaml").read_text() for path in records]
    assert ["losses.kd.KD" in text for text in configs] == [True, False]
    assert ["losses.dkd.DKD" in text for text in configs] == [False, True]
