"""`method.update_teacher=true`: the teacher learns beside its student, and neither reaches into the other."""

import copy
import csv
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import compress
from compress import models
from compress.evaluation import evaluate
from compress.losses import dkd, kd
from compress.methods.frozen_teacher import FrozenTeacher
from compress.methods.kd import KD
from compress.methods.learning_teacher import LearningTeacher
from compress.methods.mixup import Mixup
from compress.optim.schedules import Schedule
from compress.pipeline.check import checked_jobs
from compress.pipeline.parts import Parts

SMALL = ["student=resnet8", "data.limit=200", "quantizer=none", "trainer.max_epochs=2"]
TEACHER = ["method=kd", "teacher=resnet20", "teacher.training.epochs=1"]


def module(loss=None, **options):
    torch.manual_seed(0)
    teacher = LearningTeacher(models.build("resnet20", 10))
    student = models.build("resnet8", 10)
    parts = {"student": student, "optimizer": torch.optim.SGD, "scheduler": Schedule(), "num_classes": 10}
    return KD(teacher=teacher, update_teacher=True, loss=loss or kd.KD(), **parts, **options)


@pytest.mark.parametrize("loss", [kd.KD(), dkd.DKD(warmup_epochs=1)])
@pytest.mark.parametrize("mixup", [None, Mixup(), Mixup(teacher_sees="clean")])
def test_no_gradient_crosses_between_student_and_teacher(loss, mixup):
    both = module(loss, mixup=mixup)
    images, target = torch.randn(8, 3, 8, 8), torch.arange(8)
    _, terms = both.losses(images, target, both.blend(images, 0))
    of_teacher = terms.pop("teacher_loss")
    of_student = torch.stack(list(terms.values())).sum()
    for total, learns, stays in (
        (of_student, both.model, both.teacher),
        (of_teacher, both.teacher, both.model),
    ):
        options = {"retain_graph": True, "allow_unused": True}
        assert all(each is None for each in torch.autograd.grad(total, list(stays.parameters()), **options))
        assert all(each is not None for each in torch.autograd.grad(total, list(learns.parameters()), **options))


def test_the_teacher_minimises_the_loss_of_the_student_with_the_roles_exchanged():
    both = module(loss=kd.KD(alpha=0.3, temperature=2.0))
    images, target = torch.randn(8, 3, 8, 8), torch.arange(8)
    logits, terms = both.losses(images, target, None)
    teacher_logits = both.teacher(images)  # in train mode: with the statistics of the batch
    divergence = F.kl_div(F.log_softmax(teacher_logits / 2, 1), F.softmax(logits / 2, 1), reduction="batchmean")
    expected = 0.7 * F.cross_entropy(teacher_logits, target) + 0.3 * 4 * divergence
    torch.testing.assert_close(terms["teacher_loss"], expected)
    fixed = kd.KD(alpha=0.3, temperature=2.0)(logits, target, teacher_logits)
    torch.testing.assert_close({name: terms[name] for name in fixed}, fixed)


def test_a_teacher_that_learns_from_images_of_another_normalisation():
    network = models.build("resnet8", 10).eval()
    renormalise = (torch.tensor([2.0, 1.0, 0.5]), torch.tensor([0.1, -0.2, 0.3]))
    images = torch.randn(4, 3, 8, 8)
    learning = LearningTeacher(copy.deepcopy(network), renormalise)
    torch.testing.assert_close(
        learning.eval()(images), FrozenTeacher(network, (3, 16, 16), renormalise)(images), rtol=1e-4, atol=1e-4
    )
    assert set(learning.state_dict()) == {f"network.{name}" for name in network.state_dict()}


def test_the_teacher_and_the_switch_must_agree():
    frozen = FrozenTeacher(models.build("resnet8", 10), (3, 16, 16))
    with pytest.raises(ValueError, match="FrozenTeacher"):
        KD(teacher=frozen, update_teacher=True, loss=kd.KD(), student=models.build("resnet8", 10), num_classes=10,
           optimizer=torch.optim.SGD, scheduler=Schedule())  # fmt: skip


@pytest.mark.slow
def test_a_run_updates_the_teacher_only_when_asked_and_the_student_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    off, on = (compress.run([*SMALL, *TEACHER, f"method.update_teacher={switch}"]) for switch in ("false", "true"))
    records = [json.loads((each.directory / "result.json").read_text()) for each in (off, on)]
    for key in ("file", "validation_accuracy", "test_accuracy"):
        assert records[0]["teacher"][key] == records[1]["teacher"][key]
    assert "validation_accuracy_after" not in records[0]["teacher"]

    saved, without = (
        torch.load(each.directory / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)
        for each in (on, off)
    )
    assert not any(name.startswith("teacher") for name in without["state_dict"])
    found = load_file(records[1]["teacher"]["file"])
    prefix = "teacher.network."
    learned = {
        name.removeprefix(prefix): value for name, value in saved["state_dict"].items() if name.startswith(prefix)
    }
    assert set(learned) == set(found)
    changed = {name for name, value in found.items() if not torch.equal(learned[name], value)}
    # Weights and, because it is in train mode, running statistics.
    assert {"conv1.weight", "bn1.running_mean"} <= changed

    # However good the teacher is, the student is what is measured and packed.
    best = torch.load(on.directory / "checkpoints/best.ckpt", map_location="cpu", weights_only=True)
    assert best["best_network"] == records[1]["student"]["network"] == "model"
    assert records[1]["student"]["model"] == "resnet8"

    with (on.directory / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["val/accuracy"]]
    assert all(float(row["train/teacher_loss"]) > 0 for row in rows)
    accuracy = float(rows[-1]["val/accuracy_of_teacher"])
    assert records[1]["teacher"]["validation_accuracy_after"] == pytest.approx(accuracy, abs=1e-6)

    network = models.build("resnet20", 10)
    network.load_state_dict(learned)
    data = Parts(checked_jobs([*SMALL, *TEACHER])[0].config).data
    assert evaluate(network.eval(), data.val_dataloader(), 10).accuracy == pytest.approx(accuracy, abs=1e-6)
