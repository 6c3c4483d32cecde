"""MobileNetV2 for CIFAR (Sandler et al. 2018, 1801.04381) as the mdistiller and RepDistiller tables have it.

The keys are those of their checkpoints. It differs from the paper: the stem has stride 2 but the second stage has
stride 1, activations are plain ReLUs, and the first stage has its 1x1 convolution although it does not expand.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

# Channels at width 1, blocks and stride of the first block of the stages behind the one that does not expand.
STAGES = ((24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
STEM, FIRST, LAST = 32, 16, 1280


class InvertedResidual(nn.Module):
    """`(B, C, H, W) -> (B, channels, H / stride, W / stride)`, `expansion` times as wide in between."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.conv = nn.Sequential(
            *_convolution(in_channels, inner, 1),
            *_convolution(inner, inner, 3, stride, groups=inner),
            *_convolution(inner, channels, 1)[:-1],
        )
        self.has_shortcut = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.conv(x)
        return x + residual if self.has_shortcut else residual


class CifarMobileNetV2(nn.Module):
    """`(B, 3, H, W) -> (B, num_classes)`, logits; the feature map shrinks from H/2 behind the stem to H/16.

    `width` times the channels of the paper, but never fewer than 1280 features before the classifier, on which
    `dropout` falls; `expansion` times as many channels inside the blocks.
    """

    def __init__(
        self,
        num_classes: Annotated[int, Field(ge=1)],
        width: Annotated[float, Field(ge=0.1)],
        expansion: Annotated[int, Field(ge=1)],
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        super().__init__()
        channels = int(STEM * width)
        self.conv1 = nn.Sequential(*_convolution(3, channels, 3, stride=2))
        self.blocks = nn.Sequential()
        for out, blocks, stride, inner in [(FIRST, 1, 1, 1), *((*stage, expansion) for stage in STAGES)]:
            stage = nn.Sequential()
            for index in range(blocks):
                stage.append(InvertedResidual(channels, int(out * width), 1 if index else stride, inner))
                channels = int(out * width)
            self.blocks.append(stage)
        features = int(LAST * max(width, 1.0))
        self.conv2 = nn.Sequential(*_convolution(channels, features, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        linear = nn.Linear(features, num_classes)
        self.classifier = nn.Sequential(linear)  # for the key `classifier.0`
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(linear.weight, 0.0, 0.01)
        nn.init.zeros_(linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv2(self.blocks(self.conv1(images)))
        logits: Tensor = self.classifier(self.dropout(torch.flatten(self.avgpool(x), 1)))
        return logits


def _convolution(
    in_channels: int, channels: int, size: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
    convolution = nn.Conv2d(in_channels, channels, size, stride, padding=size // 2, groups=groups, bias=False)
    return convolution, nn.BatchNorm2d(channels), nn.ReLU()
