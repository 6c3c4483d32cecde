"""Steps in float32 and under bfloat16 autocast, timed, and what stays float32 under autocast."""

import math

import pytest
import torch
from torch import nn

from compress.losses.cross_entropy import CrossEntropy
from compress.methods.supervised import Supervised
from compress.models import build
from compress.optim.schedules import Schedule
from compress.training.precision import faster, speedup_of_bfloat16


@pytest.mark.parametrize(
    ("speedup", "precision"), [(0.2, "32-true"), (1.0, "32-true"), (1.04, "32-true"), (1.06, "bf16-mixed")]
)
def test_a_step_has_to_be_5_percent_faster(speedup, precision):
    assert faster(speedup) == precision


def test_both_kinds_of_steps_are_run_and_their_ratio_is_a_number():
    kinds = []

    class Small(nn.Sequential):
        def forward(self, images):
            logits = super().forward(images)
            kinds.append((logits.dtype, tuple(images.shape), self.training))
            return logits

    network = Small(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10))
    speedup = speedup_of_bfloat16([network, build("resnet8", 10)], 8, (3, 8, 8), torch.device("cpu"))
    assert 0 < speedup < math.inf
    timed = [kind for kind in kinds if kind[1][0] == 8]
    assert {*timed} == {(torch.float32, (8, 3, 8, 8), True), (torch.bfloat16, (8, 3, 8, 8), True)}
    assert [kind[0] for kind in timed[:4]] == [torch.float32, torch.bfloat16] * 2
    assert all(parameter.grad is None for parameter in network.parameters())


def learner(network, loss):
    return Supervised(
        student=network,
        loss=loss,
        optimizer=torch.optim.SGD,
        scheduler=Schedule(),
        num_classes=10,
        input_shape=(3, 16, 16),
    )


def test_statistics_of_batch_norm_are_computed_in_float32_under_autocast():
    torch.manual_seed(0)
    network = build("resnet8", 10).train()
    module, images = learner(network, CrossEntropy()), 5 + torch.randn(32, 3, 16, 16)
    taken = []
    with network.conv1.register_forward_hook(lambda layer, inputs, output: taken.append(output.detach())):
        with torch.autocast("cpu", torch.bfloat16):
            _, terms = module.losses(images, torch.arange(32) % 10, None)
        sum(terms.values()).backward()
    [maps] = taken
    assert maps.dtype == torch.bfloat16
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    assert {norm.running_mean.dtype for norm in norms} == {norm.running_var.dtype for norm in norms} == {torch.float32}
    exact = maps.double()
    # Of a number with the eight bits of bfloat16 it would be true to 0.004.
    torch.testing.assert_close(norms[0].running_mean.double(), 0.1 * exact.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    variances = 0.9 + 0.1 * exact.transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(norms[0].running_var.double(), variances, rtol=1e-5, atol=1e-6)
    assert all(parameter.grad.dtype == torch.float32 for parameter in network.parameters())


def test_every_loss_gets_logits_in_float32_under_autocast():
    given = []

    def loss(logits, target, reference, epoch):
        given.append(logits.dtype)
        return {"mean": logits.mean()}

    with torch.autocast("cpu", torch.bfloat16):
        logits, terms = learner(build("resnet8", 10), loss).losses(torch.randn(4, 3, 16, 16), torch.arange(4), None)
    assert logits.dtype == torch.bfloat16
    assert given == [torch.float32]
    assert terms["mean"].dtype == torch.float32
