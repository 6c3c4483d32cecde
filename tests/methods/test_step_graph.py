"""Which steps could be replayed on a GPU; that they are those that are taken is tested on one."""

import pytest
import torch
from torch import nn

from compress import models
from compress.losses import dml, kd
from compress.losses.cross_entropy import CrossEntropy
from compress.methods.dml import DML
from compress.methods.frozen_teacher import FrozenEnsemble, FrozenTeacher
from compress.methods.kd import KD
from compress.methods.mixup import Mixup
from compress.methods.qat import QAT
from compress.methods.step_graph import hindrance
from compress.methods.supervised import Supervised

OPTIONS = {"precision": "32-true"}
SUPPLIED = {"optimizer": None, "scheduler": None, "num_classes": 10, "input_shape": (3, 8, 8)}


class Own(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) @ torch.ones(3, 10)


class OwnLoss(CrossEntropy):
    pass


def supervised(student=None, **options):
    given = {"student": student or models.build("resnet8", 10), "loss": CrossEntropy(), **SUPPLIED, **options}
    return Supervised(**given)


def distilling(teacher):
    return KD(student=models.build("resnet8", 10), loss=kd.KD(), teacher=teacher, **SUPPLIED)


def frozen(network):
    return FrozenTeacher(network, (3, 8, 8))


def test_steps_of_our_own_parts_can_be_replayed():
    assert hindrance(supervised(), OPTIONS) is None
    assert hindrance(distilling(frozen(models.build("resnet8", 10).eval())), OPTIONS) is None
    qat = QAT(student=models.build("resnet8", 10), loss=CrossEntropy(), **SUPPLIED)
    assert hindrance(qat, OPTIONS) is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"accumulate_grad_batches": 2}, "gradients are accumulated"),
        ({"precision": "16-mixed"}, "16-mixed scales the loss"),
        ({"compile": True}, "trainer.compile is on"),
        ({"detect_anomaly": True}, "trainer.detect_anomaly is on"),
        ({"strategy": "ddp"}, "several processes train together"),
    ],
)
def test_a_trainer_can_hinder_it(options, reason):
    assert hindrance(supervised(), OPTIONS | options) == reason


def test_a_method_can_hinder_it():
    peers = [models.build("resnet8", 10)]
    mutual = DML(student=models.build("resnet8", 10), loss=dml.DML(), others=peers, **SUPPLIED)
    assert hindrance(mutual, OPTIONS) == "networks take turns"
    rate = QAT(student=models.build("resnet8", 10), loss=CrossEntropy(), weight_bits=None, weight_rate=2.0, **SUPPLIED)
    assert hindrance(rate, OPTIONS) == "the price of a bit follows from step to step"
    assert hindrance(supervised(mixup=Mixup(alpha=1.0)), OPTIONS) == "mixup draws anew for each batch"


class OwnMethod(Supervised):
    pass


@pytest.mark.parametrize(
    "module",
    [
        lambda: supervised(nn.Sequential(Own())),
        lambda: supervised(loss=OwnLoss()),
        lambda: supervised(loss=lambda *arguments: {}),
        lambda: OwnMethod(student=models.build("resnet8", 10), loss=CrossEntropy(), **SUPPLIED),
    ],
    ids=["network", "loss", "function", "method"],
)
def test_what_another_package_decides_in_python_is_not_recorded(module):
    assert hindrance(module(), OPTIONS).endswith("is of a package whose steps may differ")


def test_an_ensemble_is_looked_into():
    resnet = frozen(models.build("resnet8", 10).eval())
    assert hindrance(distilling(FrozenEnsemble([resnet, resnet])), OPTIONS) is None
