"""The LightningModules: what learns, what must not, and what a checkpoint holds."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compress import models
from compress.losses import dkd, kd
from compress.losses.cross_entropy import CrossEntropy
from compress.methods.frozen_teacher import FrozenTeacher
from compress.methods.kd import KD
from compress.methods.supervised import Supervised
from compress.optim.schedules import Cosine


def loader(count=64):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(count) % 10), batch_size=16)


def parts(seed=0):
    torch.manual_seed(seed)
    return {
        "student": models.build("resnet8", 10),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "scheduler": Cosine(),
        "num_classes": 10,
    }


def trainer(folder, epochs=2):
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
    )


def teacher():
    torch.manual_seed(7)
    network = models.build("resnet20", 10)
    network.train()
    return network


@pytest.mark.slow
@pytest.mark.parametrize("loss", [kd.KD(), dkd.DKD(warmup_epochs=1)])
def test_the_student_learns_and_the_teacher_stays(tmp_path, loss):
    network = teacher()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    frozen = FrozenTeacher(network, (3, 16, 16))
    held = {name: value.clone() for name, value in frozen.network.state_dict().items()}
    module = KD(teacher=frozen, loss=loss, **parts())
    start = {name: value.clone() for name, value in module.model.state_dict().items()}
    fitted = trainer(tmp_path)
    fitted.fit(module, loader(), loader())
    fitted.save_checkpoint(tmp_path / "checkpoint.ckpt")

    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(torch.equal(value, held[name]) for name, value in frozen.network.state_dict().items())
    assert not frozen.network.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen.network.parameters())
    assert any(not torch.equal(value, start[name]) for name, value in module.model.state_dict().items())

    saved = torch.load(tmp_path / "checkpoint.ckpt", map_location="cpu", weights_only=True)
    assert set(saved["state_dict"]) == {f"model.{name}" for name in start}
    optimized = {id(each) for group in fitted.optimizers[0].param_groups for each in group["params"]}
    assert optimized == {id(each) for each in module.model.parameters()}
    assert len(list(module.parameters())) == len(list(module.model.parameters()))


def test_a_teacher_stays_in_eval_mode_whatever_the_module_does():
    module = KD(teacher=FrozenTeacher(teacher(), (3, 16, 16)), loss=kd.KD(), **parts())
    module.train()
    images = torch.randn(4, 3, 8, 8)
    together, alone = module.teacher(images), torch.cat([module.teacher(image[None]) for image in images])
    assert not module.teacher.network.training
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_teacher_logits_are_those_of_the_network_in_eval_mode():
    network = teacher()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    images = torch.randn(8, 3, 8, 8)
    actual = FrozenTeacher(network, (3, 16, 16))(images)
    network.eval()
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, network(images).detach(), rtol=1e-3, atol=1e-3)


def test_a_teacher_of_another_normalisation_gets_its_own():
    network = teacher().eval()
    pixels = torch.rand(4, 3, 8, 8)
    ours, theirs = (
        (torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])),
        (torch.tensor(0.1), torch.tensor(0.7)),
    )
    factor, offset = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]
    frozen = FrozenTeacher(network, (3, 16, 16), (factor, offset))
    normalised = (pixels - ours[0].view(3, 1, 1)) / ours[1].view(3, 1, 1)
    expected = network((pixels - theirs[0]) / theirs[1]).detach()
    torch.testing.assert_close(frozen(normalised), expected, rtol=1e-3, atol=1e-3)


def test_no_gradient_reaches_a_teacher_through_the_loss():
    logits = torch.randn(4, 10, requires_grad=True)
    images = torch.randn(4, 3, 8, 8, requires_grad=True)
    teacher_logits = FrozenTeacher(teacher(), (3, 16, 16))(images)
    assert not teacher_logits.requires_grad
    sum(kd.KD()(logits, torch.arange(4), teacher_logits).values()).backward()
    assert images.grad is None


@pytest.mark.slow
def test_metrics_are_logged_once_an_epoch_under_their_names(tmp_path):
    module = KD(teacher=FrozenTeacher(teacher(), (3, 16, 16)), loss=dkd.DKD(warmup_epochs=1), **parts())
    fitted = trainer(tmp_path, epochs=1)
    fitted.fit(module, loader(), loader())
    names = {"cross_entropy", "tckd", "nckd", "loss", "accuracy", "learning_rate"}
    assert set(fitted.callback_metrics) == {f"train/{name}" for name in names} | {"val/accuracy", "val/loss"}
    total = sum(fitted.callback_metrics[f"train/{name}"] for name in ("cross_entropy", "tckd", "nckd"))
    torch.testing.assert_close(fitted.callback_metrics["train/loss"], total, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_validation_metrics_are_those_of_the_network_in_eval_mode(tmp_path):
    module = Supervised(loss=CrossEntropy(), **parts())
    fitted = trainer(tmp_path, epochs=1)
    fitted.fit(module, loader(), loader(50))
    module.eval()
    images, target = (torch.cat(each) for each in zip(*loader(50), strict=True))
    logits = module(images)
    accuracy = (logits.argmax(1) == target).float().mean()
    torch.testing.assert_close(fitted.callback_metrics["val/accuracy"], accuracy)
    torch.testing.assert_close(
        fitted.callback_metrics["val/loss"], nn.functional.cross_entropy(logits, target).detach()
    )
