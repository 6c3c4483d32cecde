"""Parameters and multiply-accumulates against published numbers and a count by hand."""

import pytest
import torch
from torch import nn

from compress.models import build, count_macs, count_parameters


@pytest.mark.parametrize(
    ("stem", "classes", "parameters"),
    [
        ("resnet8x4", 100, 1_233_540),
        ("resnet32x4", 100, 7_433_860),
        ("wrn_16_2", 100, 703_284),
        ("wrn_40_2", 100, 2_255_156),
        ("resnet20", 100, 278_324),
        ("resnet56", 100, 861_620),
        ("vgg8", 100, 3_965_028),
        ("vgg13", 100, 9_462_180),
        ("mobilenetv2", 100, 812_836),
        ("shufflenetv1", 100, 949_258),
        ("shufflenetv2", 100, 1_355_528),
        ("densenet121", 1000, 7_978_856 - 64 * 3 * (49 - 9)),  # but for the stem
        ("mobilenetv3_small", 1000, 2_542_856),
        ("resnet18", 10, 11_173_962),
        ("resnet50", 10, 23_520_842),
    ],
)
def test_parameters_are_as_many_as_published(stem, classes, parameters):
    assert count_parameters(build(stem, classes)) == parameters


def test_a_shared_parameter_counts_once_and_buffers_do_not_count():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    assert count_parameters(model) == 9 + 3 + 6 + 3


def test_macs_of_resnet18_equal_the_count_by_hand():
    stem = 32 * 32 * 64 * 3 * 9
    first = 4 * 32 * 32 * 64 * 64 * 9
    # A later stage has half the side and twice the channels: one convolution takes half the channels in, three take
    # all, and the shortcut is 1x1.
    later = sum(side**2 * c * (c // 2 * 9 + 3 * c * 9 + c // 2) for side, c in ((16, 128), (8, 256), (4, 512)))
    by_hand = stem + first + later + 512 * 10
    assert by_hand == 555_422_720
    assert count_macs(build("resnet18", 10), (3, 32, 32)) == by_hand


def test_attention_is_counted_as_its_two_products():
    class Attention(nn.Module):
        def forward(self, images):
            return nn.functional.scaled_dot_product_attention(images, images, images)

    assert count_macs(Attention(), (2, 16, 8)) == 2 * (2 * 16 * 16 * 8)


def test_counting_leaves_the_model_as_it_was():
    model = build("resnet8", 10)
    model.layer2.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    assert count_macs(model, (3, 16, 16)) > 0
    assert [module.training for module in model.modules()] == modes
    assert any(modes)
    assert not all(modes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_modes_come_back_when_the_model_fails():
    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout())
    with pytest.raises(RuntimeError):
        count_macs(model, (5,))
    assert model.training
    assert model[1].training


def test_a_model_on_the_meta_device_can_be_counted():
    with torch.device("meta"):
        model = build("resnet18", 10)
    assert count_macs(model, (3, 32, 32)) == 555_422_720
