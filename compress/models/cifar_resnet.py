"""The CIFAR ResNets of depth 6n + 2 (He et al. 2015, 1512.03385, section 4.2), also with wider stages ("x4").

The keys match published checkpoints: those of mdistiller and RepDistiller, hence the 1x1 shortcut convolutions.
"""

from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

# That of the deepest network of the paper; building takes longer with every block.
DEEPEST = 1202


def _six_n_plus_two(depth: int) -> int:
    if not 8 <= depth <= DEEPEST or (depth - 2) % 6:
        raise ValueError(f"6n + 2, such as 8, 20, 32 or 56, up to {DEEPEST}")
    return depth


class BasicBlock(nn.Module):
    """`(B, C, H, W) -> (B, channels, H / stride, W / stride)`"""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        activated: Tensor = self.relu(residual + shortcut)
        return activated


class CifarResNet(nn.Module):
    """`(B, 3, H, W) -> (B, num_classes)`, logits; the three stages work at H x W, H/2 x W/2 and H/4 x W/4.

    `widths` are the channels of the stem and of the three stages. `dropout` falls on the pooled features before the
    classifier, `input_dropout` on single pixels of single channels.
    """

    def __init__(
        self,
        num_classes: Annotated[int, Field(ge=1)],
        depth: Annotated[int, AfterValidator(_six_n_plus_two)],
        widths: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=4, max_length=4)],
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        input_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        super().__init__()
        blocks = (_six_n_plus_two(depth) - 2) // 6
        stem, *stages = widths
        self.input_dropout = nn.Dropout(input_dropout)
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.layer1 = _stage(stem, stages[0], blocks, stride=1)
        self.layer2 = _stage(stages[0], stages[1], blocks, stride=2)
        self.layer3 = _stage(stages[1], stages[2], blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(stages[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(self.input_dropout(images))))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))
        return logits


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))
