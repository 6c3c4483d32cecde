"""torchvision's DenseNet-121 and MobileNetV3-Small with stems for small images, under torchvision's keys."""

from typing import Annotated

from pydantic import Field
from torch import nn
from torchvision.models import DenseNet, MobileNetV3, densenet121, mobilenet_v3_small


def small_image_densenet121(num_classes: Annotated[int, Field(ge=1)]) -> DenseNet:
    """`(B, 3, H, W) -> (B, num_classes)`, logits (Huang et al. 2016, 1608.06993); the four blocks begin at H x W.

    The first convolution is 3x3 with stride 1 and there is no max-pooling.
    """
    model = densenet121(num_classes=num_classes)
    model.features.conv0 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.features.conv0.weight)
    model.features.pool0 = nn.Identity()
    return model


def small_image_mobilenet_v3_small(
    num_classes: Annotated[int, Field(ge=1)], dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
) -> MobileNetV3:
    """`(B, 3, H, W) -> (B, num_classes)`, logits (Howard et al. 2019, 1905.02244); the feature map ends at H/8.

    The first convolution and the first block have stride 1. `dropout` falls on the hidden layer of the classifier.
    """
    model = mobilenet_v3_small(num_classes=num_classes, dropout=dropout)
    for halving in (model.features[0][0], model.features[1].block[0][0]):
        halving.stride = (1, 1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # at torchvision's 0.01 the running statistics lag behind for hundreds of steps
    return model
