"""VGG for CIFAR: 3x3 convolutions with batch normalisation, one linear layer (Simonyan & Zisserman 2014, 1409.1556).

The keys are those of the mdistiller and RepDistiller checkpoints. Like these networks at 32x32, this one pools behind
three of the five stages, whatever the size of the images, which must be 8x8 or larger.
"""

from itertools import pairwise
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

Five = Field(min_length=5, max_length=5)


class CifarVGG(nn.Module):
    """`(B, 3, H, W) -> (B, num_classes)`, logits; the five stages work at H, H/2, H/4, H/8 and H/8.

    `convolutions` and `widths` are the number of convolutions and their channels in each stage. `dropout` falls on the
    pooled features before the classifier.
    """

    def __init__(
        self,
        num_classes: Annotated[int, Field(ge=1)],
        convolutions: Annotated[list[Annotated[int, Field(ge=1, le=200)]], Five],
        widths: Annotated[list[Annotated[int, Field(ge=1)]], Five],
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        super().__init__()
        stages = [
            _stage(*channels, count) for channels, count in zip(pairwise([3, *widths]), convolutions, strict=True)
        ]
        self.block0, self.block1, self.block2, self.block3, self.block4 = stages
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(cast(Tensor, module.bias))
        nn.init.normal_(self.classifier.weight, 0.0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.block0(images)))
        x = self.maxpool(self.relu(self.block1(x)))
        x = self.maxpool(self.relu(self.block2(x)))
        x = self.relu(self.block4(self.relu(self.block3(x))))
        logits: Tensor = self.classifier(self.dropout(torch.flatten(self.avgpool(x), 1)))
        return logits


def _stage(in_channels: int, channels: int, count: int) -> nn.Sequential:
    """Ends before its last activation."""
    layers: list[nn.Module] = []
    for index in range(count):
        layers += [nn.ReLU()] if index else []
        layers += [nn.Conv2d(channels if index else in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels)]
    return nn.Sequential(*layers)
