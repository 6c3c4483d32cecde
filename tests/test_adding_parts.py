"""What a user adds: one Python file and one YAML file in a folder of the user's, and nothing else."""

import csv
import re
import textwrap
from pathlib import Path

import pytest

import compress
from compress.cli import main
from compress.export.packed import read_model

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[1] / "docs/extending.md").read_text(encoding="utf-8")
SHORT = ["student=resnet8", "trainer.max_epochs=1", "quantizer=none"]
TEACHER = ["teacher=resnet8", "teacher.training.epochs=1", "data.limit=100"]

BLOCKS = [text for _, text in re.findall(r"^```(python|yaml)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)]
LOSS_OPTION = """
    _target_: squared_error.SquaredError
    weight: 0.5
"""
DATA = """
    import torch

    from compress.data.module import DataModule
    from compress.data.source import Source

    class Stripes(DataModule):
        def __init__(self, count: int, **options):
            super().__init__(**options)
            self.count = count

        def read(self):
            labels = torch.arange(self.count) % 2
            images = torch.zeros(self.count, 1, 8, 8, dtype=torch.uint8)
            images[labels == 0, :, ::2] = 255
            images[labels == 1, :, :, ::2] = 255
            return Source(images, labels, images, labels, ("horizontal", "vertical"), [0.5], [0.5])
"""
DATA_OPTION = """
    defaults: [options/images@_here_, _self_]
    _target_: stripes.Stripes
    image_size: 8
    count: 128
"""
SOLVER = """
    from dataclasses import dataclass
    from typing import Annotated

    import torch
    from pydantic import Field

    from compress.quantization.problem import Problem, Solver

    @dataclass(frozen=True)
    class Truncation(Solver):
        reads_inputs = False
        shrink: Annotated[float, Field(ge=0, lt=1)] = 0.0

        def __call__(self, problem: Problem) -> torch.Tensor:
            return problem.grid.quantize(problem.weight * (1 - self.shrink))
"""
SOLVER_OPTION = """
    defaults: [options/calibrated@_here_, _self_]
    solver: {_target_: truncation.Truncation, shrink: 0.125}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def add(folder, group, stem, python, option):
    """Writes the two files."""
    (folder / f"{stem}.py").write_text(textwrap.dedent(python))
    (folder / group).mkdir()
    (folder / group / f"{stem}.yaml").write_text(textwrap.dedent(option))


def final_metrics(result):
    with (result.directory / "metrics.csv").open() as stream:
        merged = {}
        for row in csv.DictReader(stream):
            merged |= {name: float(value) for name, value in row.items() if value}
    return merged


def refused(overrides, capsys):
    assert main(["--config-dir", ".", *overrides]) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


def test_the_loss_that_the_guide_shows_is_trained_with_and_its_values_are_checked(folder, capsys):
    [python] = [block for block in BLOCKS if "class SquaredError" in block]
    add(folder, "loss", "squared_error", python, LOSS_OPTION)
    chosen = ["loss=squared_error"]
    result = compress.run([*SHORT, *TEACHER, "method=kd", *chosen], config_dir=folder)
    metrics = final_metrics(result)
    assert metrics["train/squared_error"] == metrics["train/loss"] > 0

    wrong = refused([*SHORT, "method=kd", *chosen, "loss.weight=0"], capsys)
    assert wrong == "loss.weight: found 0; accepted: a number greater than 0"
    unfit = refused([*SHORT, "method=supervised", *chosen], capsys)
    assert unfit.startswith("loss: found one that compares with teacher")


def test_the_method_that_the_guide_shows_is_trained_with_and_its_values_are_checked(folder, capsys):
    [python] = [block for block in BLOCKS if "class LogitRegression" in block]
    [option] = [block for block in BLOCKS if "LogitRegression" in block and block is not python]
    add(folder, "method", "logit_regression", python, option.replace("compress.methods.", ""))
    chosen = ["method=logit_regression"]
    unfit = refused([*SHORT, *chosen, "loss=kd"], capsys)
    assert unfit.startswith("loss: found one that compares with teacher")
    assert unfit.endswith("accepted: cross_entropy")
    result = compress.run([*SHORT, *TEACHER, *chosen, "mixup=images"], config_dir=folder)
    metrics = final_metrics(result)
    total = metrics["train/cross_entropy"] + metrics["train/logits"]
    assert metrics["train/loss"] == pytest.approx(total, rel=1e-4)
    assert result.record.teacher.model == "resnet8"

    assert refused([*SHORT, *chosen, "method.weight=0"], capsys).startswith("method.weight: found 0; accepted: ")
    assert refused([*SHORT, *chosen, "+method.seed=1"], capsys).startswith("method.seed: found an unknown key")
    assert refused([*SHORT, *chosen, "teacher=none"], capsys).startswith("teacher: found none")


def test_a_data_set_of_the_users_is_learned_and_its_values_are_checked(folder, capsys):
    add(folder, "data", "stripes", DATA, DATA_OPTION)
    chosen = ["data=stripes"]
    result = compress.run([*SHORT, "trainer.max_epochs=3", "method=supervised", *chosen], config_dir=folder)
    assert result.record.data.class_names == ["horizontal", "vertical"]
    assert result.rows[0].test_accuracy > 0.9

    assert refused([*SHORT, *chosen, "data.count=many"], capsys).startswith("data.count: found 'many'")
    assert refused([*SHORT, *chosen, "+data.device=cpu"], capsys).startswith("data.device: found an unknown key")


def test_a_solver_of_the_users_quantizes_and_its_values_are_checked(folder, capsys):
    add(folder, "quantizer", "truncation", SOLVER, SOLVER_OPTION)
    chosen = ["student=resnet8", "trainer.max_epochs=1", "method=supervised", "data.limit=200", "quantizer=truncation"]
    options = ["quantizer.bits=[8]", "quantizer.calibration_images=32", "quantizer.correction.bias=false"]
    result = compress.run([*chosen, *options], config_dir=folder)
    assert [row.quantizer for row in result.rows] == ["none", "truncation"]
    before, after = (read_model(result.directory / row.file)[0] for row in result.rows)
    ratio = float(after.fc.weight.detach().norm() / before.fc.weight.detach().norm())
    assert ratio == pytest.approx(0.875, abs=0.01)

    wrong = refused([*chosen, "quantizer.solver.shrink=1"], capsys)
    assert wrong.startswith("quantizer.solver.shrink: found 1; accepted: ")
