"""Methods that compare features: which modules they take, what they minimise, and what stays untouched."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import compress
from compress import models
from compress.cli import main
from compress.errors import UserError
from compress.losses.attention import attention_loss
from compress.losses.cross_entropy import CrossEntropy
from compress.losses.kd import KD as KDLoss  # noqa: N811 - the method has the same name
from compress.losses.relational import angle_loss, distance_loss
from compress.methods.at import AT
from compress.methods.features import feature_layers, tapped
from compress.methods.fitnet import FitNet
from compress.methods.frozen_teacher import FrozenTeacher
from compress.methods.rkd import RKD
from compress.optim.schedules import Schedule

SHAPE = (3, 8, 8)
METHODS = {"at": AT, "fitnet": FitNet, "rkd": RKD}


def module(method, student="resnet8", teacher="resnet20", loss=None, **options):
    torch.manual_seed(0)
    return method(
        student=models.build(student, 10),
        teacher=FrozenTeacher(models.build(teacher, 10), (3, 16, 16)),
        input_shape=SHAPE,
        loss=loss or CrossEntropy(),
        optimizer=torch.optim.SGD,
        scheduler=Schedule(),
        num_classes=10,
        **options,
    ).eval()


def batch():
    return torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.arange(8)


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("resnet50", ["layer1", "layer2", "layer3", "layer4"]),
        ("resnet8x4", ["layer1", "layer2", "layer3"]),
        ("wrn_16_2", ["block1", "block2", "block3"]),
        ("vgg8", ["block0", "block1", "block2", "block4"]),
        ("mobilenetv3_small", ["features.1", "features.3", "features.8", "features.12"]),
    ],
)
@pytest.mark.parametrize("size", [8, 32])
def test_the_last_part_at_each_size_is_taken(stem, expected, size):
    network = models.build(stem, 10)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert feature_layers(network, (3, size, size)) == expected
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.slow
def test_four_maps_of_a_teacher_meet_the_last_three_of_it():
    assert module(AT, teacher="resnet18").pairs == [("layer1", "layer2"), ("layer2", "layer3"), ("layer3", "layer4")]
    assert module(FitNet, teacher="wrn_16_1").pairs == [("layer2", "block2")]
    assert module(RKD, teacher="resnet18").pairs == [("fc", "fc")]
    chosen = module(AT, teacher="resnet18", layers=["layer3"], teacher_layers=["layer4.1"])
    assert chosen.pairs == [("layer3", "layer4.1")]


@pytest.mark.parametrize("loss", [CrossEntropy(), KDLoss()])
@pytest.mark.parametrize("name", METHODS)
def test_the_terms_are_the_loss_and_the_features(name, loss):
    method = module(METHODS[name], loss=loss)
    images, target = batch()
    logits, terms = method.losses(images, target, None)
    torch.testing.assert_close(logits, method.model(images))
    for term, value in loss(logits, target, method.teacher(images), 0).items():
        torch.testing.assert_close(terms.pop(term), value)

    names, teacher_names = zip(*method.pairs, strict=True)
    with tapped(method.model, names, method.inputs) as own:
        method.model(images)
    with tapped(method.teacher.network, teacher_names, method.inputs) as others:
        method.teacher(images)
    pairs = [(own[one], others[other]) for one, other in method.pairs]
    if name == "at":
        expected = {"attention": 1000 * sum(attention_loss(*pair) for pair in pairs)}
    elif name == "rkd":
        [pair] = pairs
        expected = {"distance": 25 * distance_loss(*pair), "angle": 50 * angle_loss(*pair)}
    else:
        [(one, other)] = pairs
        weight = method.regressors[0].weight[:, :, 0, 0]
        expected = {"hint": 100 * F.mse_loss(torch.einsum("dc,bchw->bdhw", weight, one), other)}
    assert terms.keys() == expected.keys()
    for term, value in expected.items():
        torch.testing.assert_close(terms[term], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_student_learns_from_features_and_the_teacher_does_not(name):
    method = module(METHODS[name])
    networks = nn.ModuleList([method.model, method.teacher.network])
    hooks = [dict(each._forward_hooks) for each in networks.modules()]
    images, target = batch()
    _, terms = method.losses(images, target, None)
    del terms["cross_entropy"]
    sum(terms.values()).backward()
    assert method.model.conv1.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in method.teacher.network.parameters())
    assert hooks == [dict(each._forward_hooks) for each in networks.modules()]
    copy.deepcopy(method.model)


@pytest.mark.slow
def test_regressors_learn_with_the_student_and_are_not_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["student=resnet8", "teacher=resnet8x4", "teacher.training.epochs=1", "data.limit=200"]
    result = compress.run([*options, "method=fitnet", "trainer.max_epochs=2", "quantizer=none"])
    best, last = (
        torch.load(result.directory / "checkpoints" / f"{name}.ckpt", map_location="cpu", weights_only=True)
        for name in ("best", "last")
    )
    [name] = [each for each in last["state_dict"] if each.startswith("regressors.")]
    assert last["state_dict"][name].shape == (128, 32, 1, 1)
    assert best["epoch"] == last["epoch"] or not torch.equal(best["state_dict"][name], last["state_dict"][name])
    assert result.record.student.parameters == models.count_parameters(models.build("resnet8", 10))


@pytest.mark.slow
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for mistake, words in {
        "method=at method.layers=[layer9]": "method.layers: found 'layer9'; accepted: input_dropout, conv1, bn1, ",
        "method=at method.layers=[layer1] teacher=wrn_16_1": "method.layers (of the teacher): found 'layer1'; accepted",
        "method=at method.layers=[layer1] method.teacher_layers=[block9] teacher=wrn_16_1": "method.teacher_layers: ",
        "method=at method.layers=[layer1] method.teacher_layers=[layer1,layer2]": "method.teacher_layers: found 2 na",
        "method=at method.teacher_layers=[layer1]": "method.teacher_layers: found it without method.layers",
        "method=at method.layers=[fc]": "method.layers: found 'fc', which puts out no feature maps",
        "method=at method.layers=[]": "method.teacher_layers: found 0 names for 0",
        "method=at mixup=logits": "mixup: found one that blends logits",
        "method=at loss=dml": "loss: found one that compares with peers",
        "method=at teacher=none": "teacher: found none",
        "method=rkd teacher=ensemble teacher.members=[resnet8,resnet20]": "teacher: found an ensemble",
        "method=fitnet method.beta=0": "method.beta: found 0",
        "method=rkd method.angle_weight=-1": "method.angle_weight: found -1",
    }.items():
        assert main(["student=resnet8", "teacher=resnet20", *mistake.split()]) == 2, mistake
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {words}"), line
    assert list(Path().iterdir()) == []


def test_features_of_a_network_without_any_are_refused():
    flat, other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)), models.build("resnet8", 10)
    with pytest.raises(UserError, match=r"^method\.layers: found no feature maps"):
        AT.default_pairs(flat, other, SHAPE)
