"""The quantizer as YAML describes it: every file builds one that works, and bad values are said in one line."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from compress.arguments import build, check_arguments
from compress.errors import UserError
from compress.paths import CONF
from compress.quantization import Correction, GridOptions, Quantizer, Refinement, quantize
from compress.quantization.solvers import GPFQ, GPTQ, RTN

UPWARDS = """
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from compress.quantization import Problem, Solver


@dataclass(frozen=True)
class Upwards(Solver):
    step: Annotated[int, Field(ge=1)] = 1

    reads_inputs = False

    def __call__(self, problem: Problem) -> Tensor:
        steps = (problem.weight / problem.grid.scale[:, None]).ceil() + problem.grid.zero_point[:, None]
        return steps.clamp(0, problem.grid.levels - 1).to(problem.grid.quantize(problem.weight).dtype)
"""
UPWARDS_YAML = """
_target_: compress.quantization.Quantizer
bits: [4]
grid: {scale: percentile}
solver: {_target_: upwards.Upwards, step: 1}
"""


def load(name, **changes):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.merge(OmegaConf.to_container(compose("quantizer/" + name).quantizer), changes)


@pytest.mark.parametrize("name", ["gpfq", "spfq", "gptq", "qronos", "rtn"])
def test_a_yaml_file_builds_the_quantizer_of_its_name(name):
    node = load(name)
    check_arguments(Quantizer, node, "quantizer")
    quantizer = build(node, "quantizer")
    assert quantizer.name == name
    assert (*quantizer.widths, *quantizer.coded_rates) == (8, 4, 3, 2, *((2, 1) if name == "gpfq" else ()))
    assert quantizer.first_last_bits == 8
    assert quantizer.calibration_images >= 128


def test_none_is_no_quantizer():
    assert not OmegaConf.load(CONF / "quantizer" / "none.yaml")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpfq", {"solver": GPFQ(), "refinement": Refinement(12, 4, refit=True)}),
        ("rtn", {"solver": RTN(), "grid": {"scale": "max_abs"}, "correction": Correction(bias=False)}),
    ],
)
def test_a_call_is_quantize_with_the_options_of_the_file(name, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    batches = [torch.randn(16, 1, 6, 6)]
    quantizer = build(load(name, bits=3, skip=["5"], grid={"alphabet": "published"}), "quantizer")
    mine = quantizer(model, batches, 3)
    options["grid"] = GridOptions(**options.get("grid", {}), alphabet="published")
    direct = quantize(model, batches, 3, skip=["5"], **options)
    assert [layer.grid.levels for layer in mine.layers.values()] == [257, 9]
    for key, layer in direct.layers.items():
        assert torch.equal(layer.codes, mine.layers[key].codes)
    assert mine.skipped == direct.skipped == {"5": "skip: 5"}


@pytest.mark.parametrize(
    ("changes", "widths", "rates"),
    [
        ({}, [8, 4, 3, 2], [2, 1]),
        ({"bits": 4}, [4], []),
        ({"bits": [4], "rates": [1.5]}, [4], [1.5]),
        ({"rates": 1.5}, [8, 4, 3, 2], [1.5]),
        ({"rates": []}, [8, 4, 3, 2], []),
        ({"bits": [], "rates": [1.5]}, [], [1.5]),
        ({"solver": {"hard_threshold": 0.1}}, [8, 4, 3, 2], []),
        ({"budget": "10kB"}, [], []),
        ({"bits": [4], "rates": [1.5], "max_drop": 1}, [], []),
    ],
)
def test_rates_are_made_by_default_and_widths_that_are_given_stay_alone(changes, widths, rates):
    quantizer = build(load("gpfq", **changes), "quantizer")
    assert ([*quantizer.widths], [*quantizer.coded_rates]) == (widths, rates)


def test_levels_are_those_of_the_alphabet():
    assert build(load("gpfq"), "quantizer").grid.levels(2) == 4
    assert build(load("gpfq", grid={"alphabet": "published"}), "quantizer").grid.levels(2) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": [0]}, "quantizer.bits: found [0]; accepted: a list, each element a whole number from 2 to 16"),
        ({"bits": [33]}, "quantizer.bits: found [33]; accepted: a list, each element a whole number from 2 to 16"),
        ({"bits": 1}, "quantizer.bits: found 1; accepted"),
        ({"first_last_bits": 40}, "quantizer.first_last_bits: found 40; accepted"),
        ({"grid": {"scale": "best"}}, "quantizer.grid.scale: found 'best'; accepted: mse, max_abs, percentile"),
        ({"grid": {"alphabet": "odd"}}, "quantizer.grid.alphabet: found 'odd'; accepted: exact, published, narrow"),
        ({"activation_bits": 9}, "quantizer.activation_bits: found 9; accepted: a whole number from 2 to 8 or null"),
        ({"grid": {"granularity": "row"}}, "quantizer.grid.granularity: found 'row'; accepted: channel, layer"),
        ({"calibration_images": 0}, "quantizer.calibration_images: found 0; accepted"),
        ({"grid": {"percentile": 1.5}}, "quantizer.grid.percentile: found 1.5; accepted"),
        ({"grid": {"scala": "mse"}}, "quantizer.grid.scala: found an unknown key; accepted: alphabet, scale, "),
        (
            {"refinement": {"sweeps": -1}},
            "quantizer.refinement.sweeps: found -1; accepted: a whole number",
        ),
        ({"solver": {"block_size": 0}}, "quantizer.solver.block_size: found 0; accepted"),
        ({"bitz": 2}, "quantizer.bitz: found an unknown key; accepted"),
    ],
)
def test_values_out_of_range_are_said_before_any_work(changes, message):
    with pytest.raises(UserError) as caught:
        check_arguments(Quantizer, load("gpfq", **changes), "quantizer")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_value_is_checked_in_python_too():
    with pytest.raises(UserError, match=r"^sweeps: found -1; accepted: a whole number of at least 0$"):
        Refinement(sweeps=-1)
    with pytest.raises(UserError, match=r"^damping: found 0; accepted: a number greater than 0$"):
        GPTQ(damping=0)


def test_parts_that_yaml_leaves_out_are_those_of_the_defaults():
    node = {"_target_": "compress.quantization.Quantizer", "bits": 4, "refinement": {"sweeps": "2"}}
    assert build(node, "quantizer") == Quantizer(bits=[4], refinement=Refinement(sweeps=2))


def test_a_users_solver_is_one_class_and_one_yaml_file(tmp_path, monkeypatch):
    (tmp_path / "upwards.py").write_text(UPWARDS)
    (tmp_path / "upwards.yaml").write_text(UPWARDS_YAML)
    monkeypatch.syspath_prepend(tmp_path)
    node = OmegaConf.load(tmp_path / "upwards.yaml")
    quantizer = build(node, "quantizer")
    assert quantizer.name == "upwards"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    layer = quantizer(model, [torch.randn(8, 6)], 4).layers["2"]
    rounded_up = layer.grid.dequantize(layer.codes) >= model[2].weight - 1e-3 * layer.grid.scale[:, None]
    assert bool((rounded_up | (layer.codes == layer.grid.levels - 1)).all())
    with pytest.raises(UserError, match=r"^quantizer.solver.step: found 0; accepted: a whole number of at least 1$"):
        build(OmegaConf.merge(node, {"solver": {"step": 0}}), "quantizer")
