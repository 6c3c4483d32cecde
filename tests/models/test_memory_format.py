"""In which memory format networks are trained, and that their gradients are right in it."""

import copy

import pytest
import torch
from torch import nn

from compress.losses.cross_entropy import CrossEntropy
from compress.methods.supervised import Supervised
from compress.models import frozen_for_inference
from compress.optim.schedules import Schedule


class Shortcut(nn.Module):
    """A strided 1 x 1 convolution of `channels` beside one of 3 x 3, as in a residual block."""

    def __init__(self, channels):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.convolution = nn.Conv2d(channels, 16, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(channels, 16, 1, stride=2)
        self.classifier = nn.Linear(16, 10)

    def forward(self, images):
        found = torch.relu(self.stem(images))
        return self.classifier(torch.relu(self.convolution(found) + self.shortcut(found)).mean((2, 3)))


class View(nn.Module):
    """A forward that takes contiguous features alone."""

    def __init__(self):
        super().__init__()
        self.convolution, self.classifier = nn.Conv2d(3, 16, 3), nn.Linear(16 * 196, 10)

    def forward(self, images):
        return self.classifier(self.convolution(images).view(len(images), -1))


def learner(network):
    return Supervised(
        student=network,
        loss=CrossEntropy(),
        optimizer=torch.optim.SGD,
        scheduler=Schedule(),
        num_classes=10,
        input_shape=(3, 16, 16),
    )


@pytest.mark.parametrize("channels", [1, 3, 4, 7, 8, 16, 24])
def test_gradients_of_a_strided_convolution_are_those_of_double_precision(channels):
    torch.manual_seed(0)
    network = Shortcut(channels)
    exact = copy.deepcopy(network).double()
    images, target = torch.randn(32, 3, 16, 16).contiguous(memory_format=torch.channels_last), torch.arange(32) % 10
    _, terms = learner(network).losses(images, target, None)
    sum(terms.values()).backward()
    nn.functional.cross_entropy(exact(images.double()), target).backward()
    for found, expected in zip(network.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-3, atol=1e-5)


def test_weights_are_channels_last_unless_few_channels_are_strided_over():
    for channels, channels_last in {16: True, 4: False}.items():
        network = Shortcut(channels)
        learner(network)
        assert network.convolution.weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert len(network._forward_pre_hooks) == 1
    learner(network)
    assert len(network._forward_pre_hooks) == 1


def test_a_network_that_cannot_compute_in_channels_last_learns_and_is_frozen_all_the_same():
    network = View()
    images = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view"):
        network(images)
    with torch.no_grad():
        expected = network(images.contiguous())
        torch.testing.assert_close(frozen_for_inference(network, (3, 16, 16))(images), expected)
    assert not network._forward_pre_hooks
    _, terms = learner(network).losses(images, torch.arange(4), None)
    sum(terms.values()).backward()
    assert network.convolution.weight.grad is not None
