import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import nn

from compress import models
from compress.export.description import NetworkDescription
from compress.export.onnx import Onnx
from compress.export.packed import read_model, write_packed
from compress.quantization import quantize
from compress.quantization.activations import InputQuantizer, attach_input_quantizer
from compress.quantization.biases import round_bias, rounded, short_biases
from compress.quantization.grid import Grid
from compress.quantization.lsq import FakeQuantization
from compress.quantization.preparation import prepare
from compress.quantization.solvers import GPFQ, RTN
from compress.quantization.tuning import Tuner, Tuning

SHAPE = (3, 8, 8)
ABOUT = NetworkDescription({"stem": "resnet8", "options": {}, "num_classes": 5}, [*"abcde"], [0.5], [0.25], SHAPE)


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


def images(count=64):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def off_the_sums(quantized):
    """How far the biases are from whole sums of codes, in such sums, at most, but for the rounding of their type."""
    worst = 0.0
    for name, layer in quantized.layers.items():
        module = quantized.model.get_submodule(name)
        sums = module.bias.double() / (layer.grid.scale * module.input_quantizer.scale).double()
        worst = max(worst, ((sums - sums.round()).abs() - sums.abs() * 2**-23).max().item())
    return worst


def test_rounding_goes_to_the_nearest_sum_and_rounds_no_more_the_second_time():
    scale, bias = torch.tensor([0.25, 1e-3, 1e-12]), torch.tensor([0.2, -0.7, 3.0])
    once = rounded(bias, scale, torch.tensor(0.5))
    assert once[0].item() == 0.25
    assert once[1].item() == pytest.approx(-0.7, abs=2.5e-4)
    assert once[2].item() == 3.0  # whose sums are finer than its type
    assert torch.equal(rounded(once, scale, torch.tensor(0.5)), once)


@pytest.mark.parametrize("solver", [GPFQ(), RTN()])
def test_quantized_networks_have_such_biases_beside_inputs_of_8_bits_alone(solver):
    eight = quantize(network(), [images()], 4, activation_bits=8, solver=solver)
    assert off_the_sums(eight) < 1e-6
    assert all(torch.equal(eight.float_state[f"{name}.bias"], eight.model.get_submodule(name).bias) for name in "026")
    assert off_the_sums(quantize(network(), [images()], 4, activation_bits=4, solver=solver)) > 0.1


def test_networks_trained_on_grids_have_them():
    fake = FakeQuantization(4, 8)
    prepared = fake.prepare(network(), SHAPE).train()
    prepared(images())
    assert off_the_sums(fake.bake(prepared.eval(), SHAPE)) < 1e-6


def test_tuned_networks_have_them_and_change_them():
    before = quantize(network(), [images()], 4, activation_bits=8)
    after = Tuner(Tuning(images=64), prepare(network(), [images()], []), [images()])(before)
    assert off_the_sums(after) < 1e-6
    assert not torch.equal(after.float_state["6.bias"], before.float_state["6.bias"])
    assert short_biases(after).keys() == short_biases(before).keys()


def test_a_file_keeps_them_in_two_bytes_and_gives_them_back(tmp_path):
    model = models.build("resnet8", 5)
    quantized = quantize(model, [images()], 4, activation_bits=8)
    path = tmp_path / "model.safetensors"
    write_packed(path, quantized, ABOUT)
    assert off_the_sums(quantized) < 1e-6
    # What has four bytes are the scales of the inputs alone.
    assert load_file(path)["float32"].numel() == len(quantized.layers)
    read, _ = read_model(path)
    assert torch.equal(read(images()), quantized.model(images()))


@pytest.mark.slow
def test_an_onnx_file_has_the_same(tmp_path):
    model = models.build("resnet8", 5)
    quantized = quantize(model, [images()], 4, activation_bits=8)
    path = tmp_path / "model.onnx"
    Onnx().write(path, quantized, ABOUT)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    for name in quantized.layers:
        bias = stored[f"{name}.bias.codes"].astype(np.float64) * stored[f"{name}.bias.scale"]
        assert np.array_equal(bias.astype(np.float32), quantized.model.get_submodule(name).bias.detach().numpy())


def test_no_other_layer_is_touched():
    grid = Grid(torch.ones(5), torch.zeros(5, dtype=torch.int32), 2)
    for inputs in (None, InputQuantizer(1.0, 0, 16)):
        layer = nn.Linear(8, 5)
        before = layer.bias
        if inputs is not None:
            attach_input_quantizer(layer, inputs)
        round_bias(layer, grid)
        assert layer.bias is before
    without = nn.Linear(8, 5, bias=False)
    attach_input_quantizer(without, InputQuantizer(1.0, 0, 256))
    round_bias(without, grid)
    assert without.bias is None
