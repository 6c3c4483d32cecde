"""Networks and their quantization, for the tests of every format: small, and of every shape that one may meet."""

import torch
from torch import nn

from compress import models
from compress.data.digits import Digits
from compress.export.description import NetworkDescription
from compress.quantization import Grid
from compress.quantization.activations import InputQuantizer, attach_input_quantizer
from compress.quantization.biases import round_bias
from compress.quantization.quantized import QuantizedLayer, QuantizedModel, float_state

IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def describe(stem, classes=10):
    return NetworkDescription(
        architecture={"stem": stem, "options": {}, "num_classes": classes},
        class_names=[str(digit) for digit in range(classes)],
        mean=[0.5],
        standard_deviation=[0.25],
        input_shape=(3, 8, 8),
    )


def make(network):
    """A network of that class, or of that option of `conf/model` with statistics in its BatchNorms."""
    torch.manual_seed(0)
    if not isinstance(network, str):
        return network().eval()
    model = models.build(network, 10).train()
    with torch.no_grad():
        for _ in range(3):
            model(IMAGES)
    return model.eval()


def with_inputs(quantized, levels=256):
    """`quantized`, every layer reading its input on `levels` levels from the lowest to the highest value."""
    for name in quantized.layers:
        layer = quantized.model.get_submodule(name)
        seen = []
        hook = layer.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0]))
        with torch.no_grad():
            quantized.model(IMAGES)
        hook.remove()
        low, high = min(0.0, seen[0].min().item()), max(0.0, seen[0].max().item())
        scale = (high - low) / (levels - 1)
        attach_input_quantizer(layer, InputQuantizer(scale, round(-low / scale), levels))
        round_bias(layer, quantized.layers[name].grid)
    return quantized


def steps(layer):
    """The codes of a convolution as a runtime that wants channels last holds them: bytes from its zero point on."""
    signed = layer.codes.int() - layer.grid.zero_point.reshape(-1, 1, 1, 1)
    return signed.to(torch.int8).permute(0, 2, 3, 1).contiguous().numpy().tobytes()


def logits(model, images=IMAGES):
    with torch.no_grad():
        return model(images)


def digits():
    """The images that nothing was trained on, as networks take them."""
    data = Digits(image_size=8, batch_size=256)
    data.setup()
    loaders = (data.val_dataloader(), data.test_dataloader())
    return torch.cat([images for loader in loaders for images, _ in loader])


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


class TokenMixer(nn.Module):
    """Linear layers on three dimensions, which become MatMuls of a turned weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(24, 12), nn.Linear(12, 12), nn.Linear(12, 10)

    def forward(self, images):
        tokens = torch.relu(self.embed(images.flatten(1).reshape(-1, 8, 24)))
        return self.head(self.mix(tokens).mean(1))


class Repeater(TokenMixer):
    """`mix` is called three times, and what `positions` makes of a buffer is added to every image."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Linear(12, 12)
        self.register_buffer("grid", torch.randn(8, 12))

    def forward(self, images):
        tokens = torch.relu(self.embed(images.flatten(1).reshape(-1, 8, 24)))
        for _ in range(3):
            tokens = torch.relu(self.mix(tokens + self.positions(self.grid)))
        return self.head(tokens.mean(1))


def lone_convolution(weight_scale, bias, highest=254):
    """A Conv2d (3, 2 channels) on 8-bit weights, codes from 1 to `highest`, and inputs.

    The highest steps over the zero point of the second channel, which are 128 for 255, are too wide for an int8.
    """
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (2, 3, 3, 3), dtype=torch.uint8).clamp(1, 254)
    codes[1, 0, 0, 0] = highest
    grid = Grid(torch.tensor(weight_scale), torch.tensor([128, 127], dtype=torch.int32), 256)
    model = nn.Sequential(nn.Conv2d(3, 2, 3))
    model[0].weight = nn.Parameter(grid.dequantize(codes))
    model[0].bias = nn.Parameter(torch.tensor(bias))
    attach_input_quantizer(model[0], InputQuantizer(0.03, 120, 256))
    round_bias(model[0], grid)
    layer = QuantizedLayer(codes, grid, 8, None)
    return QuantizedModel(model.eval(), {"0": layer}, float_state(model, ["0"]), [], {})


class LateReader(nn.Module):
    """A tensor that is added first and read by a convolution later."""

    def __init__(self):
        super().__init__()
        self.stem, self.other, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, images):
        shared = torch.relu(self.stem(images))
        total = self.other(images) + shared
        return (torch.relu(total) + self.last(shared)).mean((2, 3))


# What every runtime of integers is tried with.
SHAPES = ["resnet8", "mobilenetv2", "vgg8", "shufflenetv2", TokenMixer, Repeater, LateReader]
