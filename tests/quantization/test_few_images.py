"""What the calibration images do not show is rounded: few images and inputs that never vary cost nothing."""

import pytest
import torch
from torch import nn

from compress import models
from compress.models.canonical import difference
from compress.quantization import GramOptions, Refinement, quantize
from compress.quantization.solvers import GPFQ, GPTQ, RTN, Qronos

SOLVERS = {"gpfq": GPFQ(), "gptq": GPTQ(), "qronos": Qronos()}


def smooth_images(count, seed):
    """Images (count, 3, 16, 16) with the smoothness of pictures."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 5, 5, generator=generator)
    fine = torch.randn(count, 3, 16, 16, generator=generator)
    return nn.functional.interpolate(coarse, (16, 16), mode="bicubic") + 0.2 * fine


def separable():
    """Depthwise and pointwise convolutions, whose inputs few images describe badly."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 16), (16, 24)):
        depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        layers += [
            depthwise,
            nn.BatchNorm2d(inputs),
            nn.ReLU6(),
            nn.Conv2d(inputs, outputs, 1),
            nn.BatchNorm2d(outputs),
        ]
    return nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(24 * 16, 10))


def network(kind):
    """A network whose norms have seen images."""
    torch.manual_seed(0)
    model = (separable() if kind == "separable" else models.build(kind, 10)).train()
    with torch.no_grad():
        for step in range(10):
            model(smooth_images(64, 100 + step))
    return model.eval()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("kind", "count"), [*(("separable", count) for count in (1, 4, 16, 64, 512)), ("resnet8", 1), ("resnet8", 16)]
)
def test_wide_codes_are_never_further_from_the_float_network_than_rounding(kind, count, solver):
    """Within what rounding itself scatters; without the ridge the largest of these is many times as far."""
    model, held_out = network(kind), smooth_images(64, 7)
    with torch.no_grad():
        expected = model(held_out)
    for bits in (8, 16):
        found, rounded = (
            difference(
                quantize(model, [smooth_images(count, 3)], bits, solver=one, first_last_bits=None).model(held_out),
                expected,
            )
            for one in (SOLVERS[solver], RTN())
        )
        assert found <= 1.05 * rounded + 1e-5


@pytest.mark.parametrize("refinement", [Refinement(), Refinement(8, 2, True)], ids=["plain", "refined"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_inputs_that_calibration_never_moves_keep_their_weights(solver, refinement):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    seen = torch.randn(64, 3, 4, 4)
    seen[:, :, :, 2:] = 0.25  # never varies, and is not zero
    seen[:, 0, 0, 0] *= 1e-4  # hardly varies
    found = quantize(model, [seen], 16, solver=SOLVERS[solver], refinement=refinement, first_last_bits=None)
    weight = found.model.get_submodule("1").weight
    assert difference(weight, model[1].weight) < 1e-3
    other = torch.randn(64, 3, 4, 4)
    assert difference(found.model(other), model(other)) < 1e-3


def test_without_a_ridge_a_dead_input_loses_its_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    seen = torch.randn(64, 3, 2, 2)
    seen[:, 0] = 0
    kept, lost = (
        quantize(model, [seen], 8, grams=GramOptions(ridge=ridge)).model.get_submodule("1").weight[:, :4]
        for ridge in (0.01, 0.0)
    )
    assert difference(kept, model[1].weight[:, :4]) < 0.02
    assert bool((lost == 0).all())


@pytest.mark.parametrize("bits", [3, 4])
def test_a_last_layer_of_more_columns_than_images_does_not_learn_the_errors_before_it(bits):
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 64, 3, stride=2), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*body, nn.Linear(576, 10)).eval()
    images, other = torch.randn(32, 3, 16, 16), torch.randn(256, 3, 16, 16)
    with torch.no_grad():
        expected = model(other)
    found, without = (
        difference(quantize(model, [images], bits, skip=skip).model(other), expected) for skip in ([], ["5"])
    )
    assert found < 1.1 * without
