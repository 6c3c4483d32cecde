"""Peers that teach each other, and blended images."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import v2

import compress
from compress import models
from compress.cli import main
from compress.losses.cross_entropy import CrossEntropy
from compress.losses.kd import KD as KDLoss  # noqa: N811 - the method has the same name
from compress.methods.frozen_teacher import FrozenTeacher
from compress.methods.kd import KD
from compress.methods.mixup import CutMix, Mixup
from compress.methods.supervised import Supervised
from compress.optim.schedules import Schedule

SMALL = ["student=resnet8", "data.limit=200", "quantizer=rtn", "quantizer.bits=4", "trainer.max_epochs=2"]


@pytest.mark.slow
def test_the_best_peer_is_the_one_that_is_reported_and_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = compress.run([*SMALL, "method=dml", "peer=resnet20", "method.peers=3"])
    saved = torch.load(result.directory / "checkpoints" / "best.ckpt", map_location="cpu", weights_only=True)
    network = saved["best_network"]
    assert result.record.student.network == network
    assert result.record.student.model == ("resnet8" if network == "model" else "resnet20")
    assert {name.split(".weight")[0] for name in saved["state_dict"] if name.endswith("conv1.weight")} >= {
        "model.conv1",
        "others.0.conv1",
        "others.1.conv1",
    }
    assert len(saved["optimizer_states"]) == len(saved["lr_schedulers"]) == 3
    metrics = (result.directory / "metrics.csv").read_text().splitlines()[0]
    assert all(f"val/accuracy_of_peer_{number}" in metrics for number in (1, 2, 3))


@pytest.mark.slow
def test_what_peers_cannot_do_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for mistake, word in {
        "method=dml teacher=resnet50": "teacher:",
        "method=dml method.peers=1": "method.peers:",
        "method=dml loss=kd": "loss:",
        "method=kd loss=dml": "loss:",
        "method=kd peer=resnet8": "peer:",
        "method=supervised mixup=logits": "mixup:",
        "method=dml trainer.gradient_clip_val=1": "trainer.gradient_clip_val:",
        "mixup=images mixup.alpha=0": "mixup.alpha:",
    }.items():
        assert main(mistake.split()) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {word}"), line
    assert list(tmp_path.iterdir()) == []


def parts():
    torch.manual_seed(0)
    return {
        "student": models.build("resnet8", 10),
        "optimizer": torch.optim.SGD,
        "scheduler": Schedule(),
        "num_classes": 10,
    }


def test_a_blend_weighs_images_with_their_partners_the_same_for_the_same_key():
    blend = Mixup(alpha=1.0).draw(8, seed=1, epoch=2, batch_index=3)
    again = Mixup(alpha=1.0).draw(8, seed=1, epoch=2, batch_index=3)
    assert 0.5 <= blend.weight <= 1
    assert (blend.weight, blend.partner.tolist()) == (again.weight, again.partner.tolist())
    assert sorted(blend.partner.tolist()) == list(range(8))
    images = torch.randn(8, 3, 4, 4)
    expected = torch.stack(
        [blend.weight * images[i] + (1 - blend.weight) * images[j] for i, j in enumerate(blend.partner)]
    )
    torch.testing.assert_close(blend(images), expected)
    weights = [Mixup().draw(2, 0, 0, index).weight for index in range(2000)]
    # The larger of w and 1 - w of a uniform w is 3/4 on average.
    assert sum(weights) / 2000 == pytest.approx(0.75, abs=0.01)


def test_blended_labels_count_by_their_weight():
    module = Supervised(loss=CrossEntropy(), mixup=Mixup(), **parts()).eval()
    images, target = torch.randn(8, 3, 8, 8), torch.arange(8)
    blend = module.blend(torch.zeros(8, 3, 8, 8), 0)
    logits, terms = module.losses(images, target, blend)
    torch.testing.assert_close(logits, module.model(blend(images)))
    labels = blend.weight * F.one_hot(target, 10) + (1 - blend.weight) * F.one_hot(target[blend.partner], 10)
    torch.testing.assert_close(terms["cross_entropy"], F.cross_entropy(logits, labels))


@pytest.mark.parametrize("teacher_sees", ["mixed", "clean"])
def test_the_teacher_sees_mixed_images_or_its_logits_are_mixed(teacher_sees):
    torch.manual_seed(1)
    teacher = FrozenTeacher(models.build("resnet8", 10), (3, 16, 16))
    module = KD(teacher=teacher, loss=KDLoss(alpha=1.0), mixup=Mixup(teacher_sees=teacher_sees), **parts()).eval()
    images, target = torch.randn(8, 3, 8, 8), torch.arange(8)
    blend = module.blend(torch.zeros(8, 3, 8, 8), 0)
    logits, terms = module.losses(images, target, blend)
    expected = teacher(blend(images)) if teacher_sees == "mixed" else blend(teacher(images))
    torch.testing.assert_close(terms["kd"], KDLoss(alpha=1.0)(logits, target, expected)["kd"])


def test_cutmix_pastes_a_box_of_the_partner_and_weighs_by_what_is_left():
    images = torch.arange(6 * 3 * 20 * 30, dtype=torch.float32).view(6, 3, 20, 30)
    for index in range(12):
        patch = CutMix().draw(6, seed=1, epoch=2, batch_index=index, size=(20, 30))
        assert patch.box == CutMix().draw(6, 1, 2, index, (20, 30)).box
        mixed, own = patch(images), 0
        top, bottom, left, right = patch.box
        for row in range(20):
            for column in range(30):
                inside = top <= row < bottom and left <= column < right
                own += not inside
                source = images[patch.partner] if inside else images
                assert torch.equal(mixed[..., row, column], source[..., row, column])
        assert patch.weight == pytest.approx(own / 600)
        logits = torch.randn(6, 4)
        expected = patch.weight * logits + (1 - patch.weight) * logits[patch.partner]
        torch.testing.assert_close(patch(logits), expected)


def test_cutmix_has_the_areas_of_torchvisions():
    torch.manual_seed(0)
    images, labels = torch.zeros(2, 3, 32, 32), torch.arange(2)
    # The label of the first image is the second's in the share that was pasted.
    theirs = [v2.CutMix(alpha=1.0, num_classes=2)(images, labels)[1][0, 0].item() for _ in range(1000)]
    ours = [CutMix().draw(2, 0, 0, index, (32, 32)).weight for index in range(1000)]
    quantiles = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    assert (torch.tensor(ours).quantile(quantiles) - torch.tensor(theirs).quantile(quantiles)).abs().max() < 0.08
