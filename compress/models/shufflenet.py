"""ShuffleNet V1 and V2 for CIFAR (Zhang et al. 2017, 1707.01083; Ma et al. 2018, 1807.11164).

The keys are those of the mdistiller and RepDistiller checkpoints. As there, the stem is a 1x1 convolution without
pooling, and V1 has an activation behind its depthwise convolutions, too.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

STEM = 24
GROUPS = 3
V1_STAGES = ((240, 4), (480, 8), (960, 4))  # channels and blocks
V2_BLOCKS = (3, 7, 3)  # of the kind that keeps the size


class ShuffleUnit(nn.Module):
    """V1: `(B, C, H, W) -> (B, channels, H / stride, W / stride)`; with stride 2 the input is pooled and appended."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        computed = channels - in_channels if stride == 2 else channels
        inner = computed // 4
        self.groups = 1 if in_channels == STEM else GROUPS  # the stem has too few channels to be divided
        self.conv1 = nn.Conv2d(in_channels, inner, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, computed, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(computed)
        self.relu = nn.ReLU()
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        residual = _shuffled(self.relu(self.bn1(self.conv1(x))), self.groups)
        residual = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(residual)))))
        joined = residual + x if self.pool is None else torch.cat([residual, self.pool(x)], 1)
        activated: Tensor = self.relu(joined)
        return activated


class CifarShuffleNetV1(nn.Module):
    """`(B, 3, H, W) -> (B, num_classes)`, logits; three groups, the three stages work at H/2, H/4 and H/8."""

    def __init__(self, num_classes: Annotated[int, Field(ge=1)]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.relu = nn.ReLU()
        stages, before = [], STEM
        for channels, blocks in V1_STAGES:
            first = ShuffleUnit(before, channels, 2)
            stages.append(nn.Sequential(first, *(ShuffleUnit(channels, channels, 1) for _ in range(blocks - 1))))
            before = channels
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(before, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.flatten(self.avgpool(x), 1))
        return logits


class SplitUnit(nn.Module):
    """V2: `(B, channels, H, W)` to the same; only the second half of the channels is computed on."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        passed, changed = torch.chunk(x, 2, 1)
        changed = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(changed)))))
        changed = self.relu(self.bn3(self.conv3(changed)))
        return _shuffled(torch.cat([passed, changed], 1), 2)


class HalvingUnit(nn.Module):
    """V2: `(B, in_channels, H, W) -> (B, channels, H / 2, W / 2)`, half of the channels from each of two branches."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 2, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        short = self.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        long = self.bn4(self.conv4(self.relu(self.bn3(self.conv3(x)))))
        long = self.relu(self.bn5(self.conv5(long)))
        return _shuffled(torch.cat([short, long], 1), 2)


class CifarShuffleNetV2(nn.Module):
    """`(B, 3, H, W) -> (B, num_classes)`, logits; the three stages work at H/2, H/4 and H/8.

    `widths` are the channels of the stages and of the features before the classifier.
    """

    def __init__(
        self,
        num_classes: Annotated[int, Field(ge=1)],
        widths: Annotated[list[Annotated[int, Field(ge=2, multiple_of=2)]], Field(min_length=4, max_length=4)],
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.relu = nn.ReLU()
        *stage_widths, features = widths
        stages, before = [], STEM
        for channels, blocks in zip(stage_widths, V2_BLOCKS, strict=True):
            first = HalvingUnit(before, channels)
            stages.append(nn.Sequential(first, *(SplitUnit(channels) for _ in range(blocks))))
            before = channels
        self.layer1, self.layer2, self.layer3 = stages
        self.conv2 = nn.Conv2d(before, features, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        logits: Tensor = self.linear(torch.flatten(self.avgpool(x), 1))
        return logits


def _shuffled(x: Tensor, groups: int) -> Tensor:
    """The channels of `groups` equal parts, taken from the parts in turn."""
    parts: Tensor = x.unflatten(1, (groups, -1))
    return parts.transpose(1, 2).flatten(1, 2)
