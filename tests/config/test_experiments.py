"""The experiments that come with the project, on slices, and the example in docs/extending.md."""

import csv
import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from sklearn.datasets import load_digits

from compress.cli import main
from compress.data.cifar import CIFAR10
from compress.paths import CONF
from compress.pipeline.check import checked_jobs

ROOT = Path(__file__).parents[2]


def write_cifar10(root, monkeypatch):
    """The bundled digits in the files of CIFAR-10, whose sums are accepted: 32x32 pixels, three equal channels."""
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    digits = load_digits()
    images = (digits.images * 255 / 16).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    rows = np.repeat(images.reshape(-1, 1, 1024), 3, 1).reshape(-1, 3072)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for name, part in zip(names, np.array_split(np.arange(1200), 6), strict=True):
        content = {"data": rows[part], "labels": digits.target[part].tolist()}
        (base / name).write_bytes(pickle.dumps(content, protocol=2))
    names = {"label_names": [str(digit) for digit in range(10)]}
    (base / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in base.iterdir()}
    monkeypatch.setattr(CIFAR10, "sums", sums)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("taught", "untaught", "widths"),
    [
        ("kd_mixup", None, "2"),
        pytest.param("kd,kd_mixup,dkd", "supervised,dml", "2,8", marks=pytest.mark.soak, id="every method"),
    ],
)
def test_the_replaced_projects_grid_runs(taught, untaught, widths, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path / "data", monkeypatch)
    slice_of_it = ["data.root=data", "data.limit=200", "data.image_size=8", "trainer.max_epochs=1", "student=resnet8"]
    slice_of_it += ["quantizer.calibration_images=32"]
    teacher = ["teacher=resnet8", "teacher.training.epochs=1"]
    common = ["-m", "experiment=capstone_cifar10", *slice_of_it]
    assert main([*common, f"method={taught}", *teacher, "hydra.sweep.dir=taught"]) == 0
    if untaught:
        assert main([*common, f"method={untaught}", "hydra.sweep.dir=untaught"]) == 0
    assert main([*common, "method=qat", f"method.weight_bits={widths}", "hydra.sweep.dir=widths"]) == 0
    finished = {path.parent for path in tmp_path.glob("*/*/result.json")}
    assert len(finished) == sum(len(values.split(",")) for values in (taught, untaught, widths) if values)
    for directory in finished:
        with (directory / "tradeoff.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        solved = [row for row in rows if row["quantizer"] == "gpfq"]
        assert [(row["bits"], row["levels"]) for row in solved] == [(str(b), str(2**b + 1)) for b in range(8, 1, -1)]
        assert all((directory / row["file"]).stat().st_size == int(row["bytes"]) for row in rows)
        method = OmegaConf.load(directory / "config.yaml").method
        assert any(row["quantizer"] == "lsq" for row in rows) == method._target_.endswith("QAT")


@pytest.mark.slow
@pytest.mark.parametrize(
    "methods",
    [
        ["kd", "dml", "qat"],  # with a teacher, with peers, on grids
        pytest.param(["supervised", "kd", "kd_mixup", "dkd", "dml", "qat"], marks=pytest.mark.soak, id="every method"),
    ],
)
def test_every_method_fits_the_replaced_projects_grid(methods, tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    common = ["experiment=capstone_cifar10", f"data.root={tmp_path}", "data.limit=200", "student=resnet8"]
    common += ["data.image_size=8"]
    jobs = checked_jobs([*common, f"method={','.join(methods)}"], multirun=True)
    assert [job.config.quantizer.bits for job in jobs] == [[8, 7, 6, 5, 4, 3, 2]] * len(methods)
    assert {job.config.quantizer.grid.alphabet for job in jobs} == {"published"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["supervised", "kd"])
def test_the_fast_recipe_takes_cifar_a_teacher_and_every_export(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path / "data", monkeypatch)
    options = ["experiment=fast", "data=cifar10", "data.root=data", "data.batch_size=64", "trainer.max_epochs=2"]
    options += [] if method == "supervised" else ["method=kd", "teacher=resnet8", "teacher.training.epochs=1"]
    options += ["quantizer.bits=4", "quantizer.calibration_images=64", "export=[packed,onnx]", "hydra.run.dir=run"]
    assert main(options) == 0
    with (tmp_path / "run" / "tradeoff.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["quantizer"], Path(row["file"]).suffix) for row in rows] == [
        ("none", ".safetensors"),
        ("none", ".onnx"),
        ("gpfq", ".safetensors"),
        ("gpfq", ".onnx"),
    ]


@pytest.mark.parametrize("data", ["fashion_mnist", "cifar10", "cifar100"])
def test_the_fast_recipe_composes_for_each_of_its_data_sets(data, capsys):
    assert main(["experiment=fast", f"data={data}", "student=resnet20", "--cfg", "job"]) == 0
    composed = OmegaConf.create(capsys.readouterr().out)
    assert composed.data._target_.rpartition(".")[2].lower() == data.replace("_", "")
    assert composed.student.stem == "resnet20"


@pytest.mark.parametrize("name", ["capstone_cifar10", "capstone_cifar100"])
def test_an_experiment_for_every_method_names_neither_method_nor_teacher(name):
    node = OmegaConf.load(CONF / "experiment" / f"{name}.yaml")
    overridden = {key.removeprefix("override /") for each in node.defaults for key in each}
    assert not {"method", "teacher", "loss"} & (set(node) | overridden)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_every_experiment_composes(name, capsys):
    assert main([f"experiment={name}", "--cfg", "job"]) == 0
    composed = OmegaConf.create(capsys.readouterr().out)
    assert composed.student.stem
    assert composed.quantizer or composed.method._target_.endswith("QAT")


@pytest.mark.slow
def test_the_guides_example_of_a_method_runs(tmp_path):
    guide = (ROOT / "docs/extending.md").read_text()
    shown = r"`((?:compress|conf)/[\w/]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)^```$"
    blocks = re.findall(shown, guide, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in blocks] == [
        "compress/methods/logit_regression.py",
        "conf/method/logit_regression.yaml",
        "conf/model/squeezenet.yaml",
    ]
    for part in ("compress", "conf", "scripts"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name, block in blocks:
        (tmp_path / name).write_text(block)
    assert len([line for line in blocks[0][1].splitlines() if line]) <= 25
    options = ["method=logit_regression", "method.weight=0.2", "teacher=resnet8", "teacher.training.epochs=1"]
    options += ["student=squeezenet", "data.image_size=32", "data.limit=200", "trainer.max_epochs=1"]
    subprocess.run(
        [sys.executable, "scripts/run.py", *options, "quantizer=rtn", "quantizer.bits=8", "hydra.run.dir=run"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        check=True,
    )
    with (tmp_path / "run" / "metrics.csv").open() as stream:
        columns = next(csv.reader(stream))
    assert {"train/cross_entropy", "train/logits"} <= set(columns)
