"""Runs whose student or teacher is of the user's own class: named on the command line, or given from Python."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import compress
from compress import models
from compress.cli import main
from compress.errors import UserError
from compress.export.container import read, write
from compress.export.description import NetworkDescription
from compress.export.packed import write_float

SCRIPTS = Path(__file__).parents[2] / "scripts"
SHORT = [
    "data.limit=200",
    "data.image_size=8",
    "trainer.max_epochs=1",
    "trainer.log_every=0",
    "trainer.accelerator=cpu",
    "quantizer.bits=[4]",
    "quantizer.calibration_images=64",
]
MODULE = """
import torch
from torch import nn
from torch.nn import functional as F


class MyNet(nn.Module):
    def __init__(self, num_classes: int, width: int = 8):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.head = nn.Linear(width * 16, num_classes)
        self.rate = torch.linspace(0, 0.1, 3)[-1].item()  # which a device without values does not know

    def forward(self, images):
        hidden = F.max_pool2d(self.norm(self.stem(images)).relu(), 2)
        hidden = F.dropout(hidden, self.rate, self.training)
        return {"features": hidden, "logits": self.head(hidden.view(len(images), -1))}


class Ten(MyNet):
    def __init__(self):
        super().__init__(10, 4)


class Other(Ten):
    pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with the user's module, which can be imported as on the command line, and a picture."""
    directory, before = tmp_path_factory.mktemp("own"), Path.cwd()
    (directory / "my_networks.py").write_text(MODULE)
    Image.new("L", (8, 8), 90).save(directory / "grey.png")
    os.chdir(directory)
    sys.path.insert(0, str(directory))
    yield directory
    os.chdir(before)
    sys.path.remove(str(directory))
    sys.modules.pop("my_networks", None)


@pytest.fixture
def networks(folder):
    import my_networks

    return my_networks


@pytest.fixture(scope="module")
def run(folder):
    """The directory of a run of MyNet from the command line."""
    typed = ["student=module", "student.target=my_networks.MyNet", "student.arguments={width: 6}"]
    assert main([*typed, "method=supervised", *SHORT, "hydra.run.dir=run"]) == 0
    return folder / "run"


def script(name, *arguments):
    """The exit code of a script in this process."""
    sys.argv, before = [name, *map(str, arguments)], sys.argv
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before
    return ended.value.code


FILES = ["student-fp32.safetensors", "student-gpfq-4bit.safetensors"]


@pytest.mark.slow
def test_a_class_in_the_working_directory_is_trained_quantized_and_named_in_the_results(run):
    student = json.loads((run / "result.json").read_text())["student"]
    assert student["model"] == "my_networks.MyNet"
    assert student["parameters"] == 6 * 27 + 6 + 2 * 6 + 960 + 10
    assert sorted(path.name for path in (run / "models").iterdir()) == FILES


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_its_files_are_read_where_the_class_is_named_and_import_nothing_otherwise(run, file, capsys, monkeypatch):
    path = run / "models" / file
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    assert script("predict", path, "grey.png") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "found a network of the class 'my_networks.MyNet'" in line
    assert "network=mynet.MyNet on the command line" in line
    assert "my_networks" not in sys.modules
    assert script("predict", path, "grey.png", "network=my_networks.MyNet") == 0
    assert capsys.readouterr().out.startswith("grey.png: ")
    assert script("predict", path, "grey.png", "network=my_networks.Absent") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert script("predict", path, "grey.png", "network=my_networks.Ten") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("file", ["models/student-fp32.safetensors", "checkpoints/best.ckpt"])
def test_it_is_quantized_again_where_the_class_is_named(run, file, capsys, monkeypatch):
    typed = [f"checkpoint={run / file}", "quantizer=rtn", "quantizer.bits=[4]", "trainer.accelerator=cpu"]
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    assert script("quantize", *typed) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "found a network of the class 'my_networks.MyNet', and no file may name code" in line
    assert "my_networks" not in sys.modules
    assert script("quantize", *typed, "network=my_networks.MyNet") == 0


@pytest.mark.slow
def test_a_file_cannot_name_code_in_its_arguments_either(run, tmp_path, capsys):
    kind, about, tensors = read(run / "models" / FILES[0])
    about["architecture"]["options"]["arguments"] = {"width": {"_target_": "antigravity.Net"}}
    path = tmp_path / "net.safetensors"
    write(path, kind, about, tensors)
    for name, *typed in (("predict", path, "grey.png"), ("quantize", f"checkpoint={path}")):
        assert script(name, *typed, "network=my_networks.MyNet") == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "found the class 'antigravity.Net'; accepted: a file that names no code to run" in line
    assert "antigravity" not in sys.modules


@pytest.mark.slow
def test_a_run_of_a_class_goes_on_where_the_class_is_allowed(run, capsys):
    before = (run / "tradeoff.csv").read_text().splitlines()[1].split(",")[:9]
    (run / "result.json").rename(run / "kept.json")
    assert main([f"resume={run}"]) == 2
    assert "if you trust it: allow_targets=[my_networks.MyNet] on the command line" in capsys.readouterr().err
    assert main([f"resume={run}", "allow_targets=[my_networks.MyNet]"]) == 0
    assert (run / "tradeoff.csv").read_text().splitlines()[1].split(",")[:9] == before


MISTAKES = [
    (["student=module"], "student.target: found no value; accepted: student.target=VALUE"),
    (["student=module", "student.target=my_networks.Absent"], "student.target: found 'my_networks.Absent', which"),
    (["student=module", "student.target=MyNet"], "student.target: found 'MyNet'; accepted: MODULE.CLASS"),
    (
        ["student=module", "student.target=my_networks.MyNet", "student.arguments={depth: 3}"],
        "student.arguments.depth: found an unknown key; accepted: width",
    ),
    (
        ["student=module", "student.target=torch.nn.Identity"],
        "student torch.nn.Identity: found a network that returns a tensor (2, 3, 8, 8); accepted: logits (images, 10)",
    ),
    (
        ["student=module", "student.target=my_networks.Ten", "data.image_size=4"],
        "data.image_size: found 4, images of 3x4x4 with",
    ),
]


@pytest.mark.parametrize(("typed", "message"), MISTAKES)
def test_a_class_that_cannot_be_used_is_one_line_before_any_work(folder, typed, message, capsys):
    short = [word for word in SHORT if word.partition("=")[0] not in {typed.partition("=")[0] for typed in typed}]
    before = sorted(folder.rglob("*.yaml"))
    assert main([*typed, "method=supervised", *short]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert sorted(folder.rglob("*.yaml")) == before


def state(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_networks_from_python_take_the_place_of_stems_and_stay_as_they_are(networks):
    torch.manual_seed(0)
    student, teacher = networks.Ten(), networks.MyNet(10, 12)
    kept, taught = state(student), state(teacher)
    teacher_training = teacher.training
    result = compress.run(["method=kd", *SHORT], student=student, teacher=teacher)
    assert same(state(student), kept)
    assert same(state(teacher), taught)
    assert (student.training, teacher.training) == (True, teacher_training)
    assert (result.record.student.model, result.record.teacher.model) == ("my_networks.Ten", "my_networks.MyNet")
    assert result.record.teacher.file is None
    config = OmegaConf.load(result.directory / "config.yaml")
    assert (config.student.stem, config.student.target) == ("module", "my_networks.Ten")
    for file in FILES:
        path = result.directory / "models" / file
        with pytest.raises(UserError, match=r"found a network of the class 'my_networks\.Ten'"):
            compress.load(path)
        network, about = compress.load(path, network=student)
        again, _ = compress.load(path, network=networks.Ten())
        images = torch.randn(4, *about["input_shape"])
        assert torch.equal(network(images), again(images))
    network, _ = compress.load(result.directory / "models" / FILES[0], network=student)
    best = torch.load(result.directory / "checkpoints" / "best.ckpt", map_location="cpu", weights_only=True)[
        "state_dict"
    ]
    for name, value in network.state_dict().items():
        assert torch.equal(value, best[f"model.{name}"]) or name.endswith("num_batches_tracked")
    assert not same(network.state_dict(), kept)  # it was trained


@pytest.mark.slow
def test_a_student_from_python_begins_with_its_own_weights(networks):
    torch.manual_seed(3)
    student = networks.Ten()
    result = compress.run(["method=supervised", *SHORT, "optimizer.lr=1e-12"], student=student)
    network, _ = compress.load(result.directory / "models" / FILES[0], network=networks.Ten)
    assert torch.allclose(network.stem.weight, student.stem.weight, atol=1e-6)


@pytest.mark.slow
def test_resuming_takes_the_network_again(networks, capsys):
    torch.manual_seed(0)
    student = networks.Ten()
    result = compress.run(["method=supervised", *SHORT], student=student)
    before = [row.test_accuracy for row in result.rows]
    (result.directory / "result.json").unlink()
    assert main([f"resume={result.directory}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "'my_networks.Ten' that was given from Python; accepted: it once more" in line
    resume = [f"resume={result.directory}"]
    for given, found in ((None, "no network"), (networks.Other(), "my_networks.Other")):
        with pytest.raises(UserError) as mistake:
            compress.run(resume, student=given)
        assert str(mistake.value).startswith(f"student: found {found} for the run in ")
        assert "accepted: a network of the class my_networks.Ten, student=NETWORK" in str(mistake.value)
    assert [row.test_accuracy for row in compress.run(resume, student=student).rows] == before


@pytest.mark.slow
def test_stages_hand_a_network_from_python_on(networks):
    stages = "stages=[{name: a, overrides: ['pruning=magnitude', 'quantizer=none']}, {name: b, overrides: ['seed=1']}]"
    result = compress.run(["method=supervised", *SHORT, stages], student=networks.Ten())
    assert [stage.name for stage in result.record.stages] == ["a", "b"]


GIVEN = [
    (["method=supervised", "student=resnet8"], {"student": True}, "student: found 'student=resnet8' beside a network"),
    (["method=supervised"], {"teacher": True}, "teacher: found 'teacher=module', but this method uses no teacher"),
    (["method=dml"], {"student": True}, "student: found a network from Python, which cannot be drawn anew as a peer"),
    (["method=supervised", "trainer=ddp_cpu"], {"student": True}, "student: found a network from Python, which other"),
    (["method=supervised"], {"student": "net"}, "student: found a str; accepted: a torch.nn.Module"),
]


@pytest.mark.parametrize(("overrides", "given", "message"), GIVEN)
def test_a_network_from_python_that_cannot_be_used_is_one_line(networks, overrides, given, message):
    given = {role: networks.Ten() if network is True else network for role, network in given.items()}
    short = [word for word in SHORT if not word.startswith("trainer.accelerator")]
    with pytest.raises(UserError) as mistake:
        compress.run([*overrides, *short], **given)
    assert str(mistake.value).startswith(message)
    assert len(str(mistake.value).splitlines()) == 1


def test_a_class_for_a_checkpoint_that_needs_none_is_refused(folder, capsys):
    network = models.build("resnet8", 10)
    about = NetworkDescription(
        {"stem": "resnet8", "options": {}, "num_classes": 10}, list("0123456789"), [0], [1], (3, 8, 8)
    )
    write_float(folder / "resnet8.safetensors", network, about)
    for more, words in (
        ([], "which is of resnet8; accepted: no network="),
        (["model=resnet8"], "found it beside model"),
    ):
        typed = ["checkpoint=resnet8.safetensors", "network=my_networks.MyNet", *more]
        assert script("quantize", *typed) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: network: ")
        assert words in line
