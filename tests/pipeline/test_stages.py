"""Runs in stages, runs from a checkpoint, and sweeps whose values an experiment names."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

import compress
from compress import models
from compress.cli import main
from compress.config.compose import compose_jobs
from compress.config.stage_plan import compose_stages
from compress.export.packed import read_model
from compress.export.weights import load_weights
from compress.models import masks
from compress.pipeline.check import checked_jobs
from compress.report.collect import collect

SMALL = ["student=resnet8", "teacher=resnet8", "teacher.training.epochs=1", "data.limit=300", "trainer.log_every=0"]
CHAIN = ["experiment=prune_quantize_distill", *SMALL, "export=packed", "trainer.max_epochs=5"]
SINGLE = ["student=resnet8", "data.limit=300", "trainer.log_every=0", "trainer.max_epochs=1", "quantizer=none"]
WEIGHTS = 77_360  # of the convolutions and the linear layer of resnet8 with ten classes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of three stages, and the folder that it was started in."""
    folder = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        result = compress.run([*CHAIN, "pruning.sparsity=0.7"])
    return replace(result, directory=folder / result.directory), folder


def masks_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    model = models.build("resnet8", 10)
    load_weights(model, checkpoint)
    for name, mask in masks.masks_of(model).items():
        assert (model.get_submodule(name).weight[~mask] == 0).all()
    return masks.masks_of(model)


def trainer_of(directory: Path) -> DictConfig:
    return OmegaConf.load(directory / "config.yaml").trainer


@pytest.mark.slow
def test_each_stage_takes_weights_and_masks_of_the_one_before(whole):
    result, _ = whole
    stages = result.record.stages
    assert [stage.directory for stage in stages] == ["1-prune", "2-quantize", "3-distill"]
    assert [stage.student.epochs for stage in stages] == [1, 2, 2]
    first, *later = (masks_of(result.directory / stage.directory / "checkpoints/best.ckpt") for stage in stages)
    assert sum(int((~mask).sum()) for mask in first.values()) == round(0.7 * WEIGHTS)
    for found in later:
        assert found.keys() == first.keys()
        assert all(torch.equal(found[name], first[name]) for name in first)
    pruned, quantized, distilled = (
        json.loads((result.directory / stage.directory / "result.json").read_text()) for stage in stages
    )
    for record in (quantized, distilled):
        # What was trained on grids is compared with the last network that was not.
        assert record["tradeoff"][0]["test_accuracy"] == pruned["tradeoff"][0]["test_accuracy"]
        assert [row["quantizer"] for row in record["tradeoff"]] == ["none", "lsq"]
        assert record["tradeoff"][1]["sparsity"] >= round(0.7 * WEIGHTS) / WEIGHTS
        assert record["tradeoff"][1]["activation_bits"] == 8
    assert pruned["teacher"] is quantized["teacher"] is None
    assert distilled["teacher"]["model"] == "resnet8"
    model, _ = read_model(result.directory / result.rows[-1].file)
    assert all((model.get_submodule(name).weight[~mask] == 0).all() for name, mask in first.items())


@pytest.mark.slow
def test_the_whole_has_one_result_and_one_table(whole):
    result, folder = whole
    record = json.loads((result.directory / "result.json").read_text())
    last = json.loads((result.directory / "3-distill" / "result.json").read_text())
    assert record["tradeoff"] == [row | {"file": f"3-distill/{row['file']}"} for row in last["tradeoff"]]
    assert all((result.directory / row["file"]).stat().st_size == row["bytes"] for row in record["tradeoff"])
    assert record["student"]["epochs"] == 5
    assert record["pruning"]["pruned"] == round(0.7 * WEIGHTS)
    assert (result.directory / "tradeoff.csv").read_text().count("3-distill/models/") == 2
    [run] = collect([folder / "outputs" / "runs"]).runs
    assert (run.directory, run.record.student.epochs, run.rows) == (result.directory, 5, result.rows)
    assert not (result.directory / "started.json").exists()


@pytest.mark.slow
def test_an_interrupted_one_goes_on_at_its_stage(whole, tmp_path, monkeypatch, capsys):
    result, folder = whole
    monkeypatch.chdir(folder)
    copy = tmp_path / "copy"
    shutil.copytree(result.directory, copy)
    (copy / "result.json").unlink()
    for path in (copy / "3-distill").iterdir():
        if path.name != "config.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (copy / "started.json").write_text(json.dumps({"overrides": ["typed"], "started": "2026-07-01T09:00:00+02:00"}))
    kept = {path: path.stat().st_mtime_ns for name in ("1-prune", "2-quantize") for path in (copy / name).rglob("*")}
    assert main([f"resume={copy}", "trainer.log_every=2"]) == 0
    assert [trainer_of(copy / name).log_every for name in ("1-prune", "2-quantize", "3-distill")] == [0, 0, 2]
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items() if path.is_file())
    record = json.loads((copy / "result.json").read_text())
    assert (record["overrides"], record["started"]) == (["typed"], "2026-07-01T09:00:00+02:00")
    # The checksum of another configuration is compressed to a few bytes more or less.
    sized = {"latency_ms", "latency_32_ms", "bytes", "ratio"}
    for row, expected in zip(record["tradeoff"], result.record.content()["tradeoff"], strict=True):
        assert row["bytes"] == pytest.approx(expected["bytes"], abs=20)
        assert {**row, **dict.fromkeys(sized)} == {**expected, **dict.fromkeys(sized)}
    assert main([f"resume={copy}", "trainer.max_epochs=9"]) == 2
    assert "the stages of a resumed run keep their epochs" in capsys.readouterr().err


def verified(directory, capsys):
    """The exit code of `--verify`, and the files that do and that do not hold, in `directory`."""
    capsys.readouterr()
    code = main(["--verify", str(directory)])
    words = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[:-1]]
    names = [(word, Path(path.rstrip(":")).relative_to(directory).as_posix()) for word, path in words]
    return code, *({name for word, name in names if word == kind} for kind in ("holds", "damaged"))


@pytest.mark.slow
def test_verify_reads_every_stage_again_wherever_the_run_lies(whole, tmp_path, capsys):
    # Elsewhere, so that the checkpoints which its configurations name are not there.
    copy, gone = tmp_path / "copy", whole[0].directory.with_name("gone")
    shutil.copytree(whole[0].directory, copy)
    files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file() and path.name != "run.log"}
    whole[0].directory.rename(gone)
    try:
        assert verified(copy, capsys) == (0, files, set())
        for name in (
            "2-quantize/result.json",
            "1-prune/models/student-fp32.safetensors",
            "3-distill/checkpoints/best.ckpt",
        ):
            content = (copy / name).read_bytes()
            (copy / name).write_bytes(content[:100] + b"\x00" + content[101:])
            code, _, damaged = verified(copy, capsys)
            assert (code, damaged) == (1, {name})
            (copy / name).write_bytes(content)
        shutil.rmtree(copy / "2-quantize")
        code, held, damaged = verified(copy, capsys)
        assert (code, damaged) == (1, {"2-quantize/result.json"})
        assert held == {name for name in files if not name.startswith("2-quantize")}
    finally:
        gone.rename(whole[0].directory)


@pytest.mark.slow
def test_a_stage_has_a_trainer_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages = "[{name: a, overrides: ['trainer.ema_decay=0.9']}, {name: b, overrides: []}]"
    result = compress.run([*SINGLE, "method=supervised", f"stages={stages}"])
    assert [trainer_of(result.directory / name).ema_decay for name in ("1-a", "2-b")] == [0.9, None]


ORDERS = ["experiment=glob(*prune*)", *SMALL, "trainer.max_epochs=20"]


@pytest.mark.slow
def test_every_order_has_the_same_epochs_and_stays_quantized():
    jobs = compose_jobs(ORDERS, multirun=True)
    assert len(jobs) == 6
    for job in jobs:
        stages = {stage.name: stage.config for stage in compose_stages(job)}
        epochs = {name.partition("-")[2]: stage.trainer.max_epochs for name, stage in stages.items()}
        assert epochs == {"prune": 4, "quantize": 8, "distill": 8}
        on_grids = [stage.method._target_.endswith("QAT") for stage in stages.values()]
        assert on_grids == sorted(on_grids)
        assert [bool(stage.pruning) for stage in stages.values()] == ["prune" in name for name in stages]
        assert next(reversed(stages.values())).export.onnx


# Each of the eighteen stages rehearses its training, its quantization and its files.
@pytest.mark.soak
def test_every_order_can_be_run():
    assert all(len(job.stages) == 3 for job in checked_jobs(ORDERS, multirun=True))


def test_an_epoch_each_comes_before_the_shares():
    for epochs, shares in ((3, [1, 1, 1]), (11, [2, 5, 4])):
        [job] = compose_jobs([*CHAIN, f"trainer.max_epochs={epochs}"])
        assert [stage.config.trainer.max_epochs for stage in compose_stages(job)] == shares


def test_what_is_typed_holds_where_the_stage_does_not_choose():
    overrides = [*CHAIN, "method.weight_bits=4", "pruning.sparsity=0.5", "optimizer.lr=0.1"]
    [job] = compose_jobs(overrides)
    prune, quantize, distill = (stage.config for stage in compose_stages(job))
    assert prune.pruning.sparsity == 0.5
    assert quantize.method.weight_bits == distill.method.weight_bits == 4
    assert {stage.optimizer.lr for stage in (prune, quantize, distill)} == {0.1}


STAGE = "{name: a, overrides: ['method=supervised']}"
MISTAKES = [
    (["stages=[{name: a}]"], "stages.0: found no overrides; accepted: name, share, overrides"),
    (["stages=[{name: a/b, overrides: []}]"], "stages.0.name: found 'a/b'"),
    ([f"stages=[{STAGE}, {STAGE}]"], "stages: found a, a; accepted: names that differ"),
    (["stages=[{name: a, share: 0.5, overrides: []}]"], "stages: found the shares 0.5; accepted: shares that sum"),
    (["stages=[{name: a, overrides: ['method=nothing']}]"], "stage 1-a: method: found 'nothing'"),
    (["stages=[{name: a, overrides: ['data.batch_size=0']}]"], "stage 1-a: data.batch_size: found 0"),
    ([f"stages=[{STAGE}]", "method=supervised"], "method=supervised: found it where every stage chooses this itself"),
    (["experiment=prune_quantize_distill", "trainer.max_epochs=2"], "trainer.max_epochs: found 2 for 3 stages"),
    (["experiment=prune_quantize_distill", "pruning.sparsity=1"], "pruning.sparsity: found 1"),
    (["student.checkpoint=absent.ckpt"], "student.checkpoint: found no file at absent.ckpt"),
]


@pytest.mark.parametrize(("mistake", "words"), MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_written(tmp_path, monkeypatch, capsys, mistake, words):
    monkeypatch.chdir(tmp_path)
    assert main(["student=resnet8", "teacher=resnet8", *mistake]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line, line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_starts_from_the_best_network_of_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pruned = compress.run([*SINGLE, "method=supervised", "pruning=magnitude", "pruning.sparsity=0.8"])
    start = f"student.checkpoint={pruned.directory}/checkpoints/best.ckpt"
    qat = compress.run([*SINGLE, "method=qat", start])
    assert qat.rows[0].test_accuracy == pruned.rows[0].test_accuracy
    assert qat.rows[1].sparsity >= round(0.8 * WEIGHTS) / WEIGHTS
    behind = masks_of(qat.directory / "checkpoints/best.ckpt")
    assert sum(int((~mask).sum()) for mask in behind.values()) == round(0.8 * WEIGHTS)

    # Channels chosen by the weights that were learned; what is left of the zeros stays zero.
    small = compress.run([*SINGLE, "method=qat", "method.weight_bits=8", "pruning=structured", start])
    assert small.rows[0].macs < pruned.rows[0].macs / 3
    assert small.rows[1].sparsity > 0.5
    again = compress.run([*SINGLE, "method=supervised", f"student.checkpoint={small.directory}/checkpoints/best.ckpt"])
    assert again.rows[0].macs == small.rows[0].macs
    assert again.rows[0].sparsity > 0.5

    capsys.readouterr()
    assert main([*SINGLE, "method=dml", start]) == 2
    assert "student.checkpoint: found a pruned network for a method whose peers" in capsys.readouterr().err


def test_a_peer_that_was_the_best_is_what_the_next_run_starts_from(tmp_path):
    good, other = models.build("resnet8", 10), models.build("resnet8", 10)
    state = {f"model.{name}": value for name, value in other.state_dict().items()}
    state |= {f"others.0.{name}": value for name, value in good.state_dict().items()}
    torch.save({"state_dict": state, "best_network": "others.0"}, tmp_path / "best.ckpt")
    loaded = models.build("resnet8", 10)
    load_weights(loaded, tmp_path / "best.ckpt")
    assert all(torch.equal(value, good.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_sweep_goes_through_the_grid_of_its_experiment():
    typed = ["experiment=pruning_sweep", "quantizer.bits=[4]"]
    jobs = compose_jobs(typed, multirun=True)
    assert [job.config.pruning.sparsity for job in jobs] == [0, 0.5, 0.7, 0.8, 0.9, 0.95]
    jobs = compose_jobs([*typed, "pruning.sparsity=0.8,0.85"], multirun=True)
    assert [job.config.pruning.sparsity for job in jobs] == [0.8, 0.85]
