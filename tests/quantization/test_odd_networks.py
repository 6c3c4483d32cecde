"""Networks that use their weights in unusual ways, quantized, written, read back and exported."""

import pytest
import torch

from compress.export.description import NetworkDescription
from compress.export.onnx import Onnx
from compress.models.canonical import difference
from compress.models.outputs import logits
from compress.quantization import Correction, quantize
from compress.quantization.solvers import GPFQ, GPTQ, RTN, Qronos
from tests.models.odd_networks import (
    CLASSES,
    EVERY,
    SHAPE,
    Attention,
    CalledAgain,
    Computed,
    TiedWeights,
    Transposed,
    make,
)

ABOUT = NetworkDescription({}, [str(index) for index in range(CLASSES)], [0.0], [1.0], SHAPE)


def images(count, seed=1):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("solver", [GPFQ(), RTN()], ids=["gpfq", "rtn"])
@pytest.mark.parametrize("network", EVERY)
def test_eight_bits_are_close_to_float_and_sixteen_closer(network, solver):
    model = make(network)
    with torch.no_grad():
        expected = logits(model(images(64, 2)))
    wide, wider = (
        difference(
            quantize(model, [images(64)], bits, solver=solver, first_last_bits=None).model(images(64, 2)), expected
        )
        for bits in (8, 16)
    )
    assert wide < 1e-2
    assert wider < 1e-3


@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("network", [TiedWeights, CalledAgain])
def test_a_weight_that_is_used_again_has_one_set_of_codes(network, activation_bits):
    model = make(network)
    quantized = quantize(model, [images(64)], 4, activation_bits=activation_bits, first_last_bits=8)
    names = ["stem", "left", "head"] if network is TiedWeights else ["stem", "again", "head"]
    assert list(quantized.layers) == names
    assert quantized.float_share == 0
    if network is TiedWeights:
        assert quantized.tied == {"right": "left"}
        assert quantized.model.right.weight is quantized.model.left.weight
        assert "right.weight" not in quantized.float_state
    with torch.no_grad():
        assert difference(quantized.model(images(64, 2)), model(images(64, 2))) < 0.2


def test_the_second_use_of_a_weight_counts_where_the_codes_are_chosen():
    model = make(CalledAgain)
    with torch.no_grad():
        model.stem.weight[0] = 0  # in the first call of `again` its first input does not vary, in the second it does
    quantized = quantize(model, [images(64)], 4, correction=Correction(bias=False))
    assert bool((quantized.model.again.weight[:, 0] != 0).any())
    with torch.no_grad():
        assert difference(quantized.model(images(64, 2)), model(images(64, 2))) < 0.3


@pytest.mark.parametrize("network", [Computed, Attention, TiedWeights, CalledAgain, Transposed])
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_an_onnx_file_computes_what_the_quantized_network_does(network, activation_bits, tmp_path):
    quantized = quantize(make(network), [images(64)], 8, activation_bits=activation_bits)
    path = tmp_path / "model.onnx"
    Onnx().write(path, quantized, ABOUT)
    model, _ = Onnx().read(path)
    with torch.no_grad():
        assert difference(model(images(8, 2)), quantized.model(images(8, 2))) < (
            1e-3 if activation_bits is None else 0.05
        )


@pytest.mark.parametrize("solver", [GPTQ(), Qronos()], ids=["gptq", "qronos"])
def test_other_solvers_take_repeated_layers_too(solver):
    model = make(CalledAgain)
    found = quantize(model, [images(64)], 8, solver=solver)
    with torch.no_grad():
        assert difference(found.model(images(64, 2)), model(images(64, 2))) < 1e-2
