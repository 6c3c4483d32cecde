"""Formats of model files: a new one is one Python file and one YAML file; a wrong one is refused before any work."""

import csv

import pytest
from PIL import Image

import compress
from compress.errors import UserError
from compress.export import formats
from compress.export.onnx import Onnx
from compress.export.openvino import OpenVino
from compress.export.packed import Packed
from compress.paths import searching
from compress.pipeline.check import checked_jobs
from compress.predict import Predictor

SMALL = [
    *("experiment=quickstart", "method=supervised", "data.limit=200", "trainer.max_epochs=1", "logger=none"),
    *("quantizer=rtn", "quantizer.bits=[4]", "quantizer.calibration_images=32"),
]
PROGRAM = '''
"""Networks as programs that torch.export saves."""

import json
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from compress.errors import UserError
from compress.export.exporter import Exporter
from compress.files import write_atomically


@dataclass(frozen=True)
class Program(Exporter):
    suffix, runtime = ".pt2", "torch.export"
    largest_batch: Annotated[int, Field(ge=2)] = 4096

    def check(self, quantizer):
        super().check(quantizer)
        if quantizer is not None and quantizer.activation_bits:
            raise UserError("export: found a program with quantized inputs; accepted: quantizer.activation_bits=null")

    def write(self, path, network, description, calibration_batches=()):
        model = getattr(network, "model", network).cpu().eval()
        batch = torch.export.Dim("batch", max=self.largest_batch)
        images = torch.zeros(2, *description.input_shape)
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
        extra = {"description": json.dumps(description.as_json())}
        write_atomically(path, lambda temporary: torch.export.save(program, temporary, extra_files=extra))

    def read(self, path, threads=1):
        extra = {"description": ""}
        model = torch.export.load(path, extra_files=extra).module()
        return lambda images: model(images), json.loads(extra["description"])
'''


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A user's folder with the module of a new format, which is the working directory."""
    (tmp_path / "program_format.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return "+export.program={_target_: program_format.Program}"


@pytest.mark.slow
def test_a_format_of_ones_own_is_one_file_and_one_node(program, tmp_path, monkeypatch):
    result = compress.run([*SMALL, program])
    with (result.directory / "tradeoff.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["runtime"] for row in rows] == ["torch", "torch.export"] * 2
    assert [row.name for row in result.rows] == [
        *("fp32", "fp32 torch.export"),
        *("rtn 4 bit", "rtn 4 bit torch.export"),
    ]
    for packed, mine in zip(rows[::2], rows[1::2], strict=True):
        assert mine["file"] == packed["file"].replace(".safetensors", ".pt2")
        assert int(mine["bytes"]) == (result.directory / mine["file"]).stat().st_size
        assert mine["test_accuracy"] == packed["test_accuracy"]
        assert (mine["sparsity"], mine["macs"]) == (packed["sparsity"], packed["macs"])
        assert float(mine["runtime_agreement"]) == 1
        assert float(mine["logit_difference"]) < 1e-4
        assert float(mine["latency_ms"]) > 0

    # Once its YAML file lies in a folder of the user's, a file of it classifies images as the packed file does.
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "program.yaml").write_text("program: {_target_: program_format.Program}\n")
    Image.new("L", (20, 20), 90).save("grey.png")
    with searching([tmp_path]):
        [expected], [prediction] = (Predictor.read(result.directory / row["file"])(["grey.png"]) for row in rows[2:])
        assert prediction.classes == expected.classes
        assert prediction.probabilities == pytest.approx(expected.probabilities, abs=1e-4)
        (tmp_path / "export" / "lost.yaml").write_text("lost: {_target_: lost_format.Lost}\n")
        with pytest.raises(UserError, match=r"lost\.yaml: found 'lost_format.Lost', which cannot be imported"):
            Predictor.read(result.directory / rows[1]["file"])


MISTAKES = [
    (["quantizer.activation_bits=8"], "export: found a program with quantized inputs; accepted: quantizer.activation"),
    (["+export.program.largest_batch=1"], "export.program.largest_batch: found 1; accepted: a whole number"),
    (["+export.program.precision=16"], "export.program.precision: found an unknown key; accepted: largest_batch"),
    (["+export.other={_target_: program_format.Program, largest_batch: 8}"], "two formats with the suffix .pt2"),
    (["+export.other={_target_: pathlib.Path}"], "export.other: found pathlib.Path; accepted: a class derived from"),
    (["+export.other={_target_: program_format.Other}"], "export.other: found 'program_format.Other', which cannot be"),
    (["+export.other=true"], "export.other: found True; accepted: its keys"),
    (["export=[packed,zip]"], "export: found 'zip'; accepted: executorch, litert, none, onnx, openvino, packed"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
def test_a_format_that_cannot_work_is_refused_before_any_work(program, tmp_path, overrides, message):
    with pytest.raises(UserError) as mistake:
        compress.run([*SMALL, program, *overrides])
    assert message in str(mistake.value)
    assert "\n" not in str(mistake.value)
    assert not (tmp_path / "outputs" / "runs").exists()


@pytest.mark.parametrize("export", ["onnx", "openvino"])
def test_onnx_refuses_codes_of_more_than_16_bits_before_any_work(export):
    with pytest.raises(UserError, match=rf"export: found {export} with 65537 levels at 16 bits; accepted: up to 65536"):
        checked_jobs([*SMALL, f"export={export}", "quantizer.bits=[16]", "quantizer.grid.alphabet=published"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("none", []),
        ("packed", ["packed"]),
        ("onnx", ["packed", "onnx"]),
        ("[packed,onnx]", ["packed", "onnx"]),
        ("[onnx,openvino]", ["packed", "onnx", "openvino"]),
    ],
)
def test_options_merge_into_one_list_of_formats(option, names):
    config = checked_jobs([*SMALL, f"export={option}"])[0].config
    assert list(config.export) == names


def test_the_format_of_a_file_is_that_of_the_longest_suffix(tmp_path, monkeypatch):
    assert formats.exporter_of(tmp_path / "student.onnx") == Onnx()
    assert formats.exporter_of(tmp_path / "student.openvino.onnx") == OpenVino()
    assert formats.exporter_of(tmp_path / "student.v2.safetensors") == Packed()
    monkeypatch.setattr(Onnx, "suffix", ".v2.safetensors")
    assert formats.exporter_of(tmp_path / "student.v2.safetensors") == Onnx()
    with pytest.raises(
        UserError, match=r"student\.bin: found no suffix of a model file; accepted: .*\.safetensors or .*\.v2"
    ):
        formats.exporter_of(tmp_path / "student.bin")


@pytest.mark.slow
def test_a_format_is_chosen_by_its_word_from_a_folder_of_ones_own(program, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "program.yaml").write_text("program: {_target_: program_format.Program}\n")
    result = compress.run([*SMALL, "export=[packed,program]"], config_dir=tmp_path)
    assert [row.runtime for row in result.rows] == ["torch", "torch.export"] * 2
