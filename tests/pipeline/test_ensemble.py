"""`teacher=ensemble`: what it computes, which files it shares, and what a run with one leaves."""

import json
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

import compress
from compress import models
from compress.cli import main
from compress.config import ensemble
from compress.config.compose import compose_jobs
from compress.config.values import check_values
from compress.evaluation import evaluate
from compress.methods.kd import KD
from compress.pipeline.check import checked_jobs
from compress.pipeline.parts import Parts
from compress.pipeline.teachers import LATER, cache_path, resolve
from compress.results.record import Record

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "run.py"
SMALL = ["student=resnet8", "data.limit=200", "trainer.max_epochs=1", "quantizer=none"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def composed(*overrides):
    return checked_jobs([*SMALL, *overrides])[0].config


def test_a_run_shares_the_cache_with_single_teachers_and_records_every_member(capsys):
    training = "teacher.training.epochs=1"
    alone = compress.run([*SMALL, "teacher=resnet8", training]).record.teacher
    capsys.readouterr()
    members = "teacher.members=[resnet8,{model:resnet8,training:{seed:1}},wrn_16_1]"
    result = compress.run([*SMALL, "teacher=ensemble", members, training])
    said = capsys.readouterr().out.splitlines()
    record = json.loads((result.directory / "result.json").read_text())["teacher"]

    found, other_seed, trained = record["members"]
    assert {key: found[key] for key in ("file", "validation_accuracy", "trained_in_this_run")} == {
        "file": alone.file,
        "validation_accuracy": alone.validation_accuracy,
        "trained_in_this_run": False,
    }
    assert [other_seed["trained_in_this_run"], trained["trained_in_this_run"]] == [True, True]
    assert len({member["file"] for member in record["members"]}) == 3
    assert [member["model"] for member in record["members"]] == ["resnet8", "resnet8", "wrn_16_1"]
    assert [member["parameters"] for member in record["members"]] == [78042, 78042, 175066]
    assert record["model"] == "ensemble"
    assert record["parameters"] == 2 * 78042 + 175066
    assert record["macs"] == sum(member["macs"] for member in record["members"])
    lines = [line for line in said if line.startswith("teacher ") and "validation accuracy" in line]
    assert [line.split()[1] for line in lines] == ["resnet8", "resnet8", "wrn_16_1", "ensemble"]

    data = Parts(composed()).data
    networks = []
    for member in record["members"]:
        network = models.build(member["model"], data.num_classes)
        network.load_state_dict(load_file(member["file"]))
        networks.append(network.eval().to(data.device))

    def mean(images):
        return sum(network(images) for network in networks) / 3

    expected = evaluate(mean, data.test_dataloader(), 10)
    assert record["test_accuracy"] == pytest.approx(expected.accuracy)
    assert list(record["test_accuracy_per_class"].values()) == pytest.approx(expected.per_class)
    assert record["validation_accuracy"] == pytest.approx(evaluate(mean, data.val_dataloader(), 10).accuracy)

    # What was trained for the ensemble is found by a single teacher, and the run's own configuration says the same.
    again = compress.run([*SMALL, "teacher=wrn_16_1", training]).record.teacher
    assert (again.file, again.trained_in_this_run) == (trained["file"], False)
    kept = OmegaConf.load(result.directory / "config.yaml")
    before = OmegaConf.to_container(kept)
    check_values(kept)
    assert OmegaConf.to_container(kept) == before
    (result.directory / "result.json").unlink()
    assert main([f"resume={result.directory}"]) == 0
    assert Record.read(result.directory / "result.json").student == result.record.student


def test_a_teacher_is_another_only_where_its_images_are():
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            Path("data", split, name).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (32, 32)).save(Path("data", split, name, f"{index}.png"))

    # The names are made of values; nothing has to be built.
    options = [*SMALL, "teacher=resnet20", "data=folder"]

    def path(*overrides):
        return cache_path(Parts(compose_jobs([*options, *overrides])[0].config), "teacher")

    assert path() == path("data.storage=disk", "data.workers=3", "data.batch_size=7")
    assert path() != path("data.random_resized_crop=[0.1,1]")
    assert path() != path("data.colour_jitter=[0.4,0.4,0.4,0]")
    # As named before there were these keys.
    parts = Parts(compose_jobs(options)[0].config)
    for key in LATER:
        assert parts.plain["data"].pop(key) is None
    assert path() == cache_path(parts, "teacher")


def test_a_member_has_the_key_of_a_single_teacher():
    member = "{model:{stem:resnet20,dropout:1e-1},training:{epochs:2e1,optimizer:{lr:0.01}}}"
    job = composed(
        "teacher=ensemble",
        f"teacher.members=[wrn_16_1,{member}]",
        "teacher.training.batch_size=32",
        "optimizer@teacher.training.optimizer=sgd",
        "scheduler@teacher.training.scheduler=cosine",
    )
    shared = ["optimizer@teacher.training.optimizer=sgd", "scheduler@teacher.training.scheduler=cosine"]
    shared += ["teacher.training.batch_size=32"]
    own = ["teacher.model.dropout=0.1", "teacher.training.epochs=20", "teacher.training.optimizer.lr=0.01"]
    singles = [composed("teacher=wrn_16_1", *shared), composed("teacher=resnet20", *shared, *own)]
    assert [cache_path(Parts(job), key) for key in ensemble.keys(job)] == [
        cache_path(Parts(single), "teacher") for single in singles
    ]


def test_the_logits_are_the_mean_of_those_of_the_members_each_with_its_own_normalisation():
    networks = []
    for stem in ("resnet8", "wrn_16_1"):
        torch.manual_seed(len(stem))
        networks.append(models.build(stem, 10).eval())
        torch.save(networks[-1].state_dict(), f"{stem}.pt")
    foreign = "{model:wrn_16_1,checkpoint:wrn_16_1.pt,mean:[0.1,0.2,0.3],standard_deviation:[0.5]}"
    members = f"teacher.members=[{{model:resnet8,checkpoint:resnet8.pt}},{foreign}]"
    job = composed("trainer.accelerator=cpu", "teacher=ensemble", members)
    parts = Parts(job)
    data = parts.data
    teacher = resolve(parts, Path("run"))
    assert [member["file"] for member in teacher.record["members"]] == ["resnet8.pt", "wrn_16_1.pt"]
    assert not hasattr(teacher.frozen, "network")

    images = next(iter(data.val_dataloader()))[0][:8]
    ours = [torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.standard_deviation)]
    pixels = images * ours[1] + ours[0]
    theirs = (pixels - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5
    with torch.no_grad():
        expected = (networks[0](images) + networks[1](theirs)) / 2
    teacher.frozen.to_float32(torch.device("cpu"))
    actual = teacher.frozen(images.requires_grad_())
    assert actual.dtype == torch.float32
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_dry_run_shows_every_member_and_the_time_to_train_those_that_are_not_there(capsys):
    torch.save(models.build("resnet20", 10).state_dict(), "given.pt")
    members = "teacher.members=[wrn_16_1,{model:resnet20,checkpoint:given.pt}]"
    assert main([*SMALL, "--dry-run", "teacher=ensemble", members, "teacher.training.epochs=500"]) == 0
    said = capsys.readouterr().out
    for part in ("[wrn_16_1,", "175,066", "272,474", "(teacher ", "student 0."):
        assert part in said
    assert not Path("outputs").exists()


def test_cfg_job_prints_the_members_and_help_names_the_ensemble(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    assert main(["--cfg", "job", "teacher=ensemble", "teacher.members=[resnet8,resnet20]"]) == 0
    assert OmegaConf.create(capsys.readouterr().out).teacher.members == ["resnet8", "resnet20"]
    assert main(["--help"]) == 0
    assert "teacher=ensemble" in capsys.readouterr().out


MISTAKES = {
    "[]": ["teacher.members:", "at least two", "teacher=STEM"],
    "[resnet8]": ["teacher.members:", "at least two"],
    "resnet8": ["teacher.members:", "a list"],
    "[resnet8,resnet99]": ["teacher.members[1]:", "'resnet99'", "wrn_40_2"],
    "[resnet8,{model:resnet99}]": ["teacher.members[1].model:", "'resnet99'", "wrn_40_2"],
    "[resnet8,{model:{stem:resnet8,width:9}}]": ["teacher.members[1].model.width:", "depth"],
    "[resnet8,{model:{stem:resnet8,dropout:2}}]": ["teacher.members[1].model.dropout:", "2"],
    "[{checkpoint:a.pt},resnet8]": ["teacher.members[0].model:", "None", "wrn_40_2"],
    "[resnet8,5]": ["teacher.members[1]:", "5", "checkpoint"],
    "[resnet8,resnet20,resnet8]": ["teacher.members[2]:", "teacher.members[0]", "training.seed"],
    "[resnet8,{model:resnet8,epochs:3}]": ["teacher.members[1].epochs:", "training"],
    "[resnet8,{model:resnet8,checkpoint:/nowhere.pt}]": ["teacher.members[1].checkpoint:", "/nowhere.pt"],
    "[resnet8,{model:resnet8,training:3}]": ["teacher.members[1].training:", "mapping"],
    "[resnet8,{model:resnet8,training:{epochs:0}}]": ["teacher.members[1].training.epochs:", "at least 1"],
    "[resnet8,{model:resnet8,training:{epoch:1}}]": ["teacher.members[1].training.epoch:", "epochs"],
    "[resnet8,{model:resnet8,training:{optimizer:{lr:-1}}}]": ["teacher.members[1].training.optimizer.lr:", "-1"],
    "[resnet8,{model:resnet20,mean:[0.5]}]": ["teacher.members[1].mean:", "both"],
    "[resnet8,resnet20] teacher.training.epochs=0": ["teacher.training.epochs:", "0"],
    "[resnet8,resnet20] teacher.checkpoint=a.pt": ["teacher.checkpoint:", "members"],
    "[resnet8,resnet20] method=supervised": ["teacher:", "no teacher"],
    "[resnet8,resnet20] method=kd method.update_teacher=true": ["method.update_teacher:", "ensemble", "false"],
}


@pytest.mark.parametrize("members", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_key(members, tmp_path, capsys):
    assert main(["teacher=ensemble", *f"teacher.members={members}".split()]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {MISTAKES[members][0]}"), line
    assert all(part in line for part in MISTAKES[members]), line
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_looks_into_the_network_wants_a_single_teacher(monkeypatch, capsys):
    class Features(KD):
        needs = KD.needs | {"features"}

    monkeypatch.setattr("compress.methods.kd.KD", Features)
    assert main(["method=kd", "teacher=ensemble", "teacher.members=[resnet8,resnet20]"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: teacher: found an ensemble, but this method compares features of one network")
    composed("method=kd", "teacher=resnet8")
