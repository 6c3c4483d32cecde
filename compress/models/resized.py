"""Networks of other libraries, on images of any size."""

from torch import Tensor, nn


class Resized(nn.Module):
    """`(B, 3, H, W) -> (B, C)`: `network`, whose images are resized to `input_size` pixels, bilinearly.

    Without it they stay as they are, unless the network is made for one size, as ViT is: then they get that, and such a
    network is made for the `input_size` where there is one. The keys are those of the network behind `network.`;
    `compress.export.weights.load_weights` takes them without that prefix, too.
    """

    def __init__(self, network: nn.Module, input_size: int | None) -> None:
        super().__init__()
        self.network = network
        self.input_size = input_size

    def forward(self, images: Tensor) -> Tensor:
        if self.input_size is not None:
            size = (self.input_size, self.input_size)
            images = nn.functional.interpolate(images, size, mode="bilinear", antialias=False)
        logits: Tensor = self.network(images)
        return logits
