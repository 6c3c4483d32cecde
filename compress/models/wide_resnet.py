"""Wide residual networks of depth 6n + 4 (Zagoruyko & Komodakis 2016, 1605.07146), with pre-activation blocks.

The keys match published checkpoints: those of mdistiller and RepDistiller.
"""

import math
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

# Building takes longer with every block.
DEEPEST = 1204


def _six_n_plus_four(depth: int) -> int:
    if not 10 <= depth <= DEEPEST or (depth - 4) % 6:
        raise ValueError(f"6n + 4, such as 16, 28 or 40, up to {DEEPEST}")
    return depth


class WideBlock(nn.Module):
    """`(B, C, H, W) -> (B, channels, H / stride, W / stride)`; `dropout` falls between the two convolutions."""

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.convShortcut = None
        if in_channels != channels:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        residual: Tensor = self.conv2(self.dropout(self.relu2(self.bn2(self.conv1(activated)))))
        # Where the channels change, the shortcut starts behind the activation; elsewhere it is the untouched input.
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return residual + shortcut


class WideStage(nn.Module):
    """Blocks in sequence; the published keys have them under `.layer`."""

    def __init__(self, in_channels: int, channels: int, blocks: int, stride: int, dropout: float) -> None:
        super().__init__()
        first = WideBlock(in_channels, channels, stride, dropout)
        self.layer = nn.Sequential(first, *(WideBlock(channels, channels, 1, dropout) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layer(x)
        return features


class WideResNet(nn.Module):
    """`(B, 3, H, W) -> (B, num_classes)`, logits; the three stages work at H x W, H/2 x W/2 and H/4 x W/4.

    The stages have 16, 32 and 64 channels times `widen_factor`. `dropout` is that of the blocks, `input_dropout` falls
    on single pixels of single channels.
    """

    def __init__(
        self,
        num_classes: Annotated[int, Field(ge=1)],
        depth: Annotated[int, AfterValidator(_six_n_plus_four)],
        widen_factor: Annotated[int, Field(ge=1)],
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        input_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        super().__init__()
        blocks = (_six_n_plus_four(depth) - 4) // 6
        narrow, middle, wide = 16 * widen_factor, 32 * widen_factor, 64 * widen_factor
        self.input_dropout = nn.Dropout(input_dropout)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(16, narrow, blocks, 1, dropout)
        self.block2 = WideStage(narrow, middle, blocks, 2, dropout)
        self.block3 = WideStage(middle, wide, blocks, 2, dropout)
        self.bn1 = nn.BatchNorm2d(wide)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(wide, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                height, width = module.kernel_size
                nn.init.normal_(module.weight, 0.0, math.sqrt(2 / (height * width * module.out_channels)))
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(self.input_dropout(images))
        x = self.block3(self.block2(self.block1(x)))
        x = self.avgpool(self.relu(self.bn1(x)))
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits
