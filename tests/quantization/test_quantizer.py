"""The quantizer as YAML describes it: every file builds one that works, and bad values are said in one line."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from compress.arguments import check_arguments
from compress.errors import UserError
from compress.paths import CONF
from compress.quantization import Quantizer, quantize
from compress.quantization.refinement import Refinement
from compress.quantization.solvers import gpfq, rtn


def load(name, **changes):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.create(OmegaConf.to_container(compose("quantizer/" + name).quantizer) | changes)


@pytest.mark.parametrize("name", ["gpfq", "rtn"])
def test_a_yaml_file_builds_the_quantizer_of_its_name(name):
    node = load(name)
    check_arguments(Quantizer, node, "quantizer")
    quantizer = instantiate(node)
    assert quantizer.name == name
    assert quantizer.bits == [8, 4, 3, 2]
    assert quantizer.first_last_bits == 8
    assert quantizer.calibration_images >= 128


def test_none_is_no_quantizer():
    assert not OmegaConf.load(CONF / "quantizer" / "none.yaml")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpfq", {"solver": gpfq, "refine": Refinement(12, 4, refit=True)}),
        ("rtn", {"solver": rtn, "scale": "max_abs", "bias_correction": False}),
    ],
)
def test_a_call_is_quantize_with_the_options_of_the_file(name, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    batches = [torch.randn(16, 1, 6, 6)]
    mine = instantiate(load(name, bits=3, skip=["5"], alphabet="published"))(model, batches, 3)
    direct = quantize(model, batches, 3, levels="published", skip=["5"], **options)
    assert [layer.grid.levels for layer in mine.layers.values()] == [257, 9]
    for key, layer in direct.layers.items():
        assert torch.equal(layer.codes, mine.layers[key].codes)
    assert mine.skipped == direct.skipped == {"5": "skip: 5"}


def test_levels_are_those_of_the_alphabet():
    assert instantiate(load("gpfq")).levels(2) == 4
    assert instantiate(load("gpfq", alphabet="published")).levels(2) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": [0]}, "quantizer.bits: found [0]; accepted: a list of at least 1 element"),
        ({"bits": [33]}, "quantizer.bits: found [33]; accepted: a list of at least 1 element"),
        ({"bits": 1}, "quantizer.bits: found 1; accepted"),
        ({"bits": []}, "quantizer.bits: found []; accepted"),
        ({"first_last_bits": 40}, "quantizer.first_last_bits: found 40; accepted"),
        ({"scale": "best"}, "quantizer.scale: found 'best'; accepted: mse, max_abs, percentile"),
        ({"alphabet": "odd"}, "quantizer.alphabet: found 'odd'; accepted: exact, published, narrow"),
        ({"activation_bits": 9}, "quantizer.activation_bits: found 9; accepted: a whole number from 2 to 8 or null"),
        ({"granularity": "row"}, "quantizer.granularity: found 'row'; accepted: channel, layer"),
        ({"calibration_images": 0}, "quantizer.calibration_images: found 0; accepted"),
        ({"percentile": 1.5}, "quantizer.percentile: found 1.5; accepted"),
        ({"bitz": 2}, "quantizer.bitz: found an unknown key; accepted"),
    ],
)
def test_values_out_of_range_are_said_before_any_work(changes, message):
    with pytest.raises(UserError) as caught:
        check_arguments(Quantizer, load("gpfq", **changes), "quantizer")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
