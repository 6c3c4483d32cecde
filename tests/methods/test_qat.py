"""Training on grids: where it starts, what is frozen, which loss it takes, and whose figures its rows are."""

import csv
import json

import pytest
import torch
from torch import nn

import compress
from compress import models
from compress.cli import main
from compress.losses.cross_entropy import CrossEntropy
from compress.losses.kd import KD as KDLoss  # noqa: N811 - the method has the same name
from compress.methods.frozen_teacher import FrozenTeacher
from compress.methods.qat import QAT
from compress.optim.schedules import Schedule
from compress.quantization.lsq import steps
from compress.results.record import Layer

RUN = ["student=resnet8", "trainer.max_epochs=4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A float run on all digits, and quantization-aware training from its student."""
    folder = tmp_path_factory.mktemp("qat")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        start = compress.run([*RUN, "method=supervised", "quantizer=rtn", "quantizer.bits=2"])
        weights = f"student.checkpoint={start.directory}/models/student-fp32.safetensors"
        widths = ["method.weight_bits=2", "method.activation_bits=4", "method.freeze_bn_epoch=2"]
        trained = compress.run([*RUN, "method=qat", weights, *widths, "quantizer=gpfq", "quantizer.bits=[2]"])
        patched.chdir(folder.parent)
    return folder, start, trained


@pytest.mark.slow
def test_it_starts_from_a_checkpoint_and_its_row_is_that_of_what_was_trained(runs):
    folder, start, trained = runs
    reference, own, gpfq = trained.rows
    assert (reference.quantizer, own.quantizer, gpfq.quantizer) == ("none", "lsq", "gpfq")
    assert reference.test_accuracy == start.rows[0].test_accuracy
    assert (own.bits, own.levels, own.first_last_bits, own.activation_bits) == (2, 4, 8, 4)
    assert own.test_accuracy > 0.9
    assert own.test_accuracy > start.rows[1].test_accuracy + 0.2
    with (folder / trained.directory / "metrics.csv").open() as stream:
        best = max(float(row["val/accuracy"]) for row in csv.DictReader(stream) if row["val/accuracy"])
    assert own.validation_accuracy == pytest.approx(best, abs=1e-6)
    layers = trained.record.layers["student-lsq-w2a4.safetensors"]
    assert layers.quantized["layer2.0.conv1"] == Layer(bits=2, levels=4, error=None, encoding="entropy")
    assert layers.input_bits["conv1"] == layers.input_bits["fc"] == 8
    assert set(layers.input_bits.values()) == {4, 8}
    json.loads((folder / trained.directory / "result.json").read_text())


@pytest.mark.slow
def test_steps_are_saved_and_learned_without_decay(runs):
    folder, _, trained = runs
    saved = torch.load(folder / trained.directory / "checkpoints" / "best.ckpt", map_location="cpu", weights_only=True)
    names = [name for name in saved["state_dict"] if name.endswith(".step")]
    assert len(names) == 2 * 10
    assert all(torch.isfinite(saved["state_dict"][name]).all() for name in names)
    decayed, free = saved["optimizer_states"][0]["param_groups"]
    assert decayed["weight_decay"] > 0
    assert free["weight_decay"] == 0
    assert len(free["params"]) == len(names)


@pytest.mark.slow
def test_a_rate_is_trained_to_a_file_of_about_as_many_bits(runs, tmp_path, monkeypatch):
    """At fewer bytes than path following has at the same rate, as codes and weights are trained for them."""
    folder, start, _ = runs
    monkeypatch.chdir(tmp_path)
    weights = f"student.checkpoint={folder / start.directory}/models/student-fp32.safetensors"
    options = ["method.weight_rate=1", "quantizer=gpfq", "quantizer.bits=[]", "quantizer.rates=[1]"]
    trained = compress.run(["student=resnet8", "method=qat_rate", weights, *options, "trainer.max_epochs=10"])
    reference, own, gpfq = trained.rows
    assert reference.test_accuracy == start.rows[0].test_accuracy
    assert (own.quantizer, own.levels, own.first_last_bits, own.activation_bits) == ("lsq", None, None, 32)
    assert own.name == f"lsq {own.bits:.3} bits/weight"
    assert own.bits == pytest.approx(1, rel=0.2)
    assert own.bytes < 1.2 * gpfq.bytes
    assert own.test_accuracy > max(0.85, gpfq.test_accuracy)
    layers = trained.record.layers[own.file.removeprefix("models/")].quantized
    assert {layer.encoding for layer in layers.values()} == {"entropy"}
    with (trained.directory / "metrics.csv").open() as stream:
        rates = [float(row["train/bits_per_weight"]) for row in csv.DictReader(stream) if row["train/bits_per_weight"]]
    assert rates[0] > 1.5 > 1.25 > rates[-1]


def parts():
    torch.manual_seed(0)
    return {"optimizer": torch.optim.SGD, "scheduler": Schedule(), "num_classes": 10, "input_shape": (3, 8, 8)}


@pytest.mark.parametrize("teacher", [None, "resnet20"])
def test_the_loss_is_that_of_the_fake_quantized_student(teacher):
    frozen = teacher and FrozenTeacher(models.build(teacher, 10), (3, 16, 16))
    loss = KDLoss() if teacher else CrossEntropy()
    module = QAT(student=models.build("resnet8", 10), weight_bits=2, teacher=frozen, loss=loss, **parts())
    images, target = torch.randn(8, 3, 8, 8), torch.arange(8)
    module.eval()
    logits, terms = module.losses(images, target, None)
    torch.testing.assert_close(logits, module.model(images))
    expected = loss(logits, target, frozen and frozen(images), 0)
    assert terms.keys() == expected.keys()
    assert all(torch.equal(terms[name], expected[name]) for name in terms)
    sum(terms.values()).backward()
    assert all(step.grad is not None for step in steps(module.model))


def test_frozen_statistics_stay_and_others_move(tmp_path):
    module = QAT(student=models.build("resnet8", 10), freeze_bn_epoch=1, loss=CrossEntropy(), **parts())
    norm = module.model.bn1
    module.train()
    module.on_train_epoch_start()
    before = norm.running_mean.clone()
    module.model(torch.randn(8, 3, 8, 8))
    assert not torch.equal(norm.running_mean, before)

    module.freeze_bn_epoch = 0
    module.train()
    module.on_train_epoch_start()
    before = norm.running_mean.clone()
    module.model(torch.randn(8, 3, 8, 8))
    assert torch.equal(norm.running_mean, before)
    assert not any(each.training for each in module.modules() if isinstance(each, nn.BatchNorm2d))
    assert norm.weight.requires_grad


@pytest.mark.slow
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for mistake, words in {
        "method=qat method.weight_bits=1": "method.weight_bits: found 1; accepted: a whole number from 2 to 8",
        "method=qat method.weight_bits=null": "method.weight_bits, method.weight_rate, method.activation_bits: fo",
        "method=qat_rate method.weight_rate=null": "method.weight_bits, method.weight_rate, method.activation_bits: fo",
        "method=qat method.weight_rate=1": "method.weight_rate: found 1.0 beside weight_bits=4; accepted: one of them",
        "method=qat_rate method.weight_rate=9": "method.weight_rate: found 9",
        "method=qat method.skip=[layer9.*]": "method.skip: found 'layer9.*', which matches no layer",
        "method=qat student.checkpoint=absent.safetensors": "student.checkpoint: ",
        "method=qat teacher=resnet8": "teacher: found 'teacher=resnet8', but this method with this loss uses no",
        "method=qat loss=dml": "loss: found one that compares with peers",
        "method=qat loss=kd teacher=none": "teacher: found none, but this method learns from one",
        "method=qat mixup=logits": "mixup: found one that blends the logits of a teacher",
        "method=qat method.freeze_bn_epoch=-1": "method.freeze_bn_epoch: found -1",
    }.items():
        assert main(["student=resnet8", *mistake.split()]) == 2, mistake
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {words}"), line
    assert list(tmp_path.iterdir()) == []
