"""torchvision's ResNet with the stem for small images: its keys, so that published checkpoints load unchanged.

He et al. 2015 (1512.03385). The first convolution is 3x3 with stride 1 and there is no max-pooling, as in the
CIFAR checkpoints that carry these keys (`edadaltocg/resnet50_cifar10`).
"""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

LAYERS = {18: (BasicBlock, [2, 2, 2, 2]), 34: (BasicBlock, [3, 4, 6, 3]), 50: (Bottleneck, [3, 4, 6, 3])}


class SmallImageResNet(ResNet):  # type: ignore[misc]  # torchvision has no annotations
    """`(B, 3, H, W) -> (B, num_classes)`, logits; the feature map is H x W until the second of four stages.

    `dropout` falls on the pooled features before the classifier, `input_dropout` on single pixels of single channels.
    """

    def __init__(
        self,
        num_classes: Annotated[int, Field(ge=1)],
        depth: Literal[18, 34, 50],
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        input_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        block, layers = LAYERS[depth]
        super().__init__(block, layers, num_classes=num_classes)
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        self.input_dropout = nn.Dropout(input_dropout)
        # Inside the pooling, since a Sequential as `fc` would rename `fc.weight`.
        self.avgpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Dropout(dropout))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = super().forward(self.input_dropout(images))
        return logits
