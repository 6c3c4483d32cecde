"""torchvision's classifiers by name."""

import pytest
import torch
import torchvision
from torchvision.models import list_models

from compress.errors import UserError
from compress.models import build

# The smallest of each family.
NAMES = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vit_b_32",
    "wide_resnet50_2",
]  # fmt: skip


def test_a_family_is_tested_by_its_smallest():
    families = {name.split("_")[0].rstrip("0123456789") for name in list_models(module=torchvision.models)}
    assert {name.split("_")[0].rstrip("0123456789") for name in NAMES} == families


@pytest.mark.parametrize("name", NAMES)
def test_images_of_any_size_become_logits(name):
    # Shapes are enough; RegNet reads values while it is built.
    with torch.device("cpu" if "regnet" in name else "meta"), torch.no_grad():
        network = build("torchvision", 7, name=name).eval()
        wants = 32 if network.input_size else 96
        assert network(torch.zeros(2, 3, wants, wants)).shape == (2, 7)


@pytest.mark.parametrize("name", ["vit_b_32", "maxvit_t", "resnet18"])
def test_a_network_is_made_for_the_input_size(name):
    with torch.device("meta"):
        network = build("torchvision", 7, name=name, input_size=448).eval()
        assert network.input_size == 448
        assert network(torch.zeros(1, 3, 16, 16)).shape == (1, 7)


def test_what_cannot_be_made_is_refused():
    with pytest.raises(UserError, match="name: found 'resnet17'; accepted: a classifier of torchvision, such as"):
        build("torchvision", 7, name="resnet17")
    with pytest.raises(UserError, match="input_size: found 40, for which torchvision has no vit_b_32"):
        build("torchvision", 7, name="vit_b_32", input_size=40)
