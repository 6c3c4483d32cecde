"""Every argument of Lightning's Trainer works, or is refused in one line; docs/trainer.md says which."""

import csv
import inspect
import json
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

import compress
from compress.cli import main
from compress.config.ranges import TRAINER, TRAINER_REFUSED
from compress.training.epoch_lines import EpochLines

OURS = {"compile", "cuda_graph", "early_stopping", "ema_decay", "log_every"}
SHORT = ["method=supervised", "student=resnet8", "data.limit=100", "data.batch_size=16", "trainer.max_epochs=2"]
SHORT += ["trainer.accelerator=cpu", "quantizer=none", "export=none", "hydra.run.dir=run"]
IMAGES = {"validation": 15, "train": 85}
BATCHES = 5  # of 16 images


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def outcome(directory=Path("run")):
    """The metrics of the epochs, the student's record and the last checkpoint, of a run whose results are right."""
    with (directory / "metrics.csv").open() as stream:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(stream)]
    # The trade-off has a row of its own.
    metrics = [row for row in rows if "train/loss" in row]
    student = json.loads((directory / "result.json").read_text())["student"]
    validated = [row for row in metrics if "val/accuracy" in row]
    best = max(validated, key=lambda row: row["val/accuracy"])
    assert student["best_epoch"] == 1 + best["epoch"]
    last = torch.load(directory / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)
    assert last["epoch"] + 1 == len(metrics) == student["epochs"]
    return metrics, student, last


def run(*options):
    compress.run([*SHORT, *options])
    return outcome()


def weights(last):
    return torch.cat([tensor.double().flatten() for tensor in last["state_dict"].values()])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The outcome without any argument."""
    directory = tmp_path_factory.mktemp("plain")
    compress.run([*SHORT, f"hydra.run.dir={directory / 'run'}"])
    return outcome(directory / "run")


def test_the_table_has_every_argument_of_the_trainer_and_none_else():
    text = (Path(__file__).parents[2] / "docs/trainer.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| (works|refused) \|", text, re.MULTILINE))
    assert [*table] == sorted(inspect.signature(pl.Trainer).parameters)
    assert {name for name, here in table.items() if here == "works"} == TRAINER.keys() - OURS
    assert {name for name, here in table.items() if here == "refused"} == TRAINER_REFUSED.keys()


@pytest.mark.parametrize("name", TRAINER_REFUSED)
def test_a_refused_argument_says_why_and_what_is_instead(name, capsys, tmp_path):
    assert main([*SHORT, f"+trainer.{name}=1"]) == 2
    said = capsys.readouterr().err.strip()
    assert re.fullmatch(rf"error: trainer\.{name}: found 1, .+; accepted: .+", said)
    assert not any(tmp_path.iterdir())


REFUSED = {
    "+trainer.limit_train_batches=0": ["limit_train_batches:", "0", "at least 1"],
    "+trainer.limit_train_batches=0.0": ["limit_train_batches:", "0.0", "greater than 0"],
    "+trainer.limit_train_batches=0.1": ["limit_train_batches:", "0.1", "none of the 5 batches", "at least 0.2"],
    "+trainer.limit_val_batches=0": ["limit_val_batches:", "0", "at least 1"],
    "+trainer.limit_val_batches=0.5": ["limit_val_batches:", "0.5", "none of the 1 batches", "at least 1.0"],
    "+trainer.limit_val_batches=1.5": ["limit_val_batches:", "1.5"],
    "+trainer.check_val_every_n_epoch=0": ["check_val_every_n_epoch:", "0", "at least 1"],
    "+trainer.check_val_every_n_epoch=3": ["check_val_every_n_epoch:", "3", "none of the epochs 1 to 2"],
    "+trainer.check_val_every_n_epoch=2 trainer.max_epochs=3 pruning=magnitude pruning.end_epoch=3": [
        *("check_val_every_n_epoch:", "2", "none of the epochs 3 to 3")
    ],
    "+trainer.accumulate_grad_batches=2 method=dml": ["accumulate_grad_batches:", "several optimizers"],
    "+trainer.gradient_clip_algorithm=value": ["gradient_clip_algorithm:", "without trainer.gradient_clip_val"],
    "+trainer.gradient_clip_algorithm=max trainer.gradient_clip_val=1": ["gradient_clip_algorithm:", "norm"],
    "+trainer.deterministic=true +trainer.benchmark=true": ["benchmark:", "deterministic"],
    "trainer.precision=16-mixed": ["precision:", "GPU", "bf16-mixed"],
    "method=kd teacher=resnet8 teacher.training.precision=16-mixed": ["teacher.training.precision:", "GPU"],
    "trainer.precision=half": ["precision:", "bf16-mixed"],
    "trainer.devices=2": ["devices:", "trainer=ddp"],
    "+trainer.strategy=fsdp": ["strategy:", "ddp"],
}


@pytest.mark.parametrize("typed", REFUSED)
def test_values_that_would_not_work_are_refused(typed, capsys, tmp_path):
    assert main([*SHORT, *typed.split()]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: t"), said
    assert said.count("\n") == 0
    assert all(part in said for part in REFUSED[typed]), said
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["+trainer.benchmark=true", "+trainer.inference_mode=false", "+trainer.detect_anomaly=true"],
        ["+trainer.deterministic=true", "trainer.devices=1", "+trainer.num_nodes=1", "+trainer.strategy=auto"],
        [
            *("+trainer.deterministic=warn", "+trainer.sync_batchnorm=false", "+trainer.limit_train_batches=1.0"),
            *("+trainer.limit_val_batches=99", "+trainer.check_val_every_n_epoch=1"),
            "+trainer.accumulate_grad_batches=1",
        ],
    ],
)
def test_what_changes_no_figure_changes_none(plain, options):
    metrics, student, last = run(*options)
    assert (metrics, student) == plain[:2]
    assert torch.equal(weights(last), weights(plain[2]))
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["2", "0.5"])
def test_epochs_of_fewer_batches_step_as_often_and_the_schedule_ends_with_them(plain, limit):
    metrics, _, last = run(f"+trainer.limit_train_batches={limit}", "pruning=magnitude", "pruning.end_epoch=1")
    assert last["global_step"] == 4
    assert [row["step"] for row in metrics] == [1, 3]
    assert metrics[-1]["train/learning_rate"] == pytest.approx(plain[0][-1]["train/learning_rate"])


@pytest.mark.slow
def test_the_best_epoch_is_chosen_on_fewer_images_and_the_rows_are_on_all():
    metrics, student, _ = run("+trainer.limit_val_batches=2", "data.evaluation_batch_size=4")
    assert all(row["val/accuracy"] * 8 == pytest.approx(round(row["val/accuracy"] * 8)) for row in metrics)
    found = student["validation_accuracy"] * IMAGES["validation"]
    assert found == pytest.approx(round(found))


@pytest.mark.slow
def test_gradients_of_several_batches_make_one_step_and_the_schedule_counts_steps(plain):
    metrics, _, last = run("+trainer.accumulate_grad_batches=2", "trainer.ema_decay=0.5")
    assert last["global_step"] == 2 * -(-BATCHES // 2)
    assert metrics[-1]["train/learning_rate"] == pytest.approx(plain[0][-1]["train/learning_rate"])


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipped_gradients_move_the_weights_as_little(algorithm):
    chosen = ["optimizer=sgd", "optimizer.lr=1", "optimizer.momentum=0", "optimizer.weight_decay=0", "scheduler=none"]
    chosen += ["+trainer.limit_train_batches=1", "trainer.max_epochs=1", "trainer.gradient_clip_val=1e-3"]
    _, _, clipped = run(*chosen, f"+trainer.gradient_clip_algorithm={algorithm}")
    compress.run([*SHORT, *chosen, "trainer.gradient_clip_val=1e-9", "hydra.run.dir=still"])
    still = outcome(Path("still"))[2]["state_dict"]
    names = [name for name in still if name.endswith(("weight", "bias"))]
    moved = torch.cat([(clipped["state_dict"][name] - still[name]).flatten() for name in names])
    found = moved.norm() if algorithm == "norm" else moved.abs().max()
    assert found.item() == pytest.approx(1e-3, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_trains_and_is_measured_in_float32(precision):
    _, student, last = run(f"trainer.precision={precision}")
    kinds = {tensor.dtype for name, tensor in last["state_dict"].items() if name.endswith("weight")}
    assert kinds == {{"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)}
    assert 0 <= student["validation_accuracy"] <= 1


@pytest.mark.slow
def test_the_best_epoch_is_one_of_those_that_are_validated_and_a_resumed_run_finds_the_same(monkeypatch, capsys):
    chosen = ["+trainer.check_val_every_n_epoch=2", "trainer.max_epochs=5", "trainer.ema_decay=0.5"]
    metrics, student, last = run(*chosen)
    assert [row["epoch"] for row in metrics if "val/accuracy" in row] == [1, 3]
    assert student["best_epoch"] in (2, 4)
    assert student["validation_accuracy"] == pytest.approx(max(row.get("val/accuracy", 0) for row in metrics))
    assert capsys.readouterr().out.count("validation ") >= 2

    begin = EpochLines.on_train_epoch_start

    def stop_in_the_third(lines, trainer, module):
        if trainer.current_epoch == 2:
            raise RuntimeError("stopped")
        begin(lines, trainer, module)

    with monkeypatch.context() as stopping:
        stopping.setattr(EpochLines, "on_train_epoch_start", stop_in_the_third)
        with pytest.raises(RuntimeError, match="stopped"):
            compress.run([*SHORT, *chosen, "hydra.run.dir=again"])
    assert main(["resume=again"]) == 0
    again = outcome(Path("again"))
    assert again[:2] == (metrics, student)
    assert torch.equal(weights(again[2]), weights(last))


@pytest.mark.slow
def test_early_stopping_counts_validations():
    chosen = ["+trainer.check_val_every_n_epoch=2", "trainer.early_stopping=1", "trainer.max_epochs=20"]
    metrics, _, _ = run(*chosen, "optimizer.lr=1e-9")
    assert [row["epoch"] for row in metrics if "val/accuracy" in row] == [1, 3]
    assert len(metrics) == 4


@pytest.mark.slow
def test_processes_that_train_together_count_as_one_does():
    chosen = ["trainer=ddp_cpu", "+trainer.check_val_every_n_epoch=2", "+trainer.limit_train_batches=4"]
    chosen += ["+trainer.limit_val_batches=1", "data.evaluation_batch_size=4", "+trainer.accumulate_grad_batches=2"]
    metrics, _, last = run(*chosen)
    assert [row["epoch"] for row in metrics if "val/accuracy" in row] == [1]
    assert last["global_step"] == 4
