"""Networks of the user's that return more than logits: as students, peers and teachers, and in model files."""

import sys
from pathlib import Path

import pytest
import torch

import compress
from compress.cli import main
from compress.errors import UserError
from compress.export.packed import read_model
from compress.paths import searching
from compress.pipeline.check import checked_jobs

MODULE = """
import odd_networks
import torch
from torch import nn


class Named(odd_networks.Named):
    def __init__(self, num_classes: int):
        super().__init__()
        self.head = nn.Linear(6, num_classes)


class Pair(odd_networks.Pair):
    def __init__(self, num_classes: int):
        super().__init__()
        self.head = nn.Linear(6, num_classes)


class TwoNames(Named):
    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.body = nn.Sequential(self.stem, nn.ReLU())


class Viewed(Named):
    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.head = nn.Linear(216, num_classes)

    def forward(self, images):
        hidden = self.stem(images).relu()
        return self.head(hidden.view(hidden.shape[0], -1))


class Features(Named):
    def forward(self, images):
        return self.stem(images).mean((2, 3)), [images]


class Maps(Named):
    def forward(self, images):
        return self.stem(images)


class Fickle(Named):
    made = 0

    def __init__(self, num_classes):
        super().__init__(num_classes)
        Fickle.made += 1
        self.register_buffer("count", torch.zeros(Fickle.made))


class Auxiliary(Named):
    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.auxiliary = nn.Linear(6, num_classes)

    def forward(self, images):
        hidden = self.stem(images).relu().mean((2, 3))
        return (self.head(hidden), self.auxiliary(hidden)) if self.training else self.head(hidden)


class Choosy(Named):
    def forward(self, images):
        return {0.0: super().forward(images)}[images.abs().sum().item()]


class InTraining(Named):
    def forward(self, images):
        found = super().forward(images)
        return [found["features"]] if self.training else found
"""
GOOGLENET = "_target_: torchvision.models.googlenet\ninit_weights: false\naux_logits: true\n"
SHORT = ["data.limit=100", "trainer.max_epochs=1", "trainer.log_every=0", "quantizer.bits=[8]"]
SHORT += ["quantizer.calibration_images=16", "hydra.run.dir=run"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the networks above, their options in `mine`."""
    (tmp_path / "my_outputs.py").write_text(MODULE)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    names = ["Named", "Pair", "TwoNames", "Features", "Viewed", "Maps", "Fickle", "Auxiliary", "Choosy", "InTraining"]
    for name in names:
        (tmp_path / "mine" / "model" / f"{name.lower()}.yaml").write_text(f"_target_: my_outputs.{name}\n")
    (tmp_path / "mine" / "model" / "googlenet.yaml").write_text(GOOGLENET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "models"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_outputs", raising=False)
    with searching([tmp_path / "mine"]):
        yield tmp_path


CHOICES = {
    "a mapping": ["method=supervised", "student=named", "trainer.ema_decay=0.9", "export=[packed,onnx]"],
    "a tuple, on grids": ["method=qat", "student=pair", "~quantizer.bits", "~quantizer.calibration_images"],
    "peers": ["method=dml", "student=named", "peer=pair"],
    "features": ["method=fitnet", "student=named", "teacher=pair", "teacher.training.epochs=1", "method.layers=[stem]"],
    "an auxiliary head": [
        *("method=supervised", "student=auxiliary", "quantizer=rtn"),
        *("export=[packed,onnx]", "~quantizer.calibration_images"),
    ],
    "a teacher": ["method=dkd", "student=pair", "teacher=auxiliary", "teacher.training.epochs=1"],
    "a teacher with a module under two names": [
        "method=kd",
        "student=pair",
        "teacher=twonames",
        "teacher.training.epochs=1",
    ],
    "a view": [
        *("method=kd", "student=viewed", "teacher=viewed", "teacher.training.epochs=1", "data.image_size=8"),
        "export=[packed,onnx]",
    ],
    "a view, on grids": [
        *("method=qat", "student=viewed", "data.image_size=8", "~quantizer.bits", "~quantizer.calibration_images")
    ],
    "masks": ["method=supervised", "student=pair", "pruning=magnitude", "optimizer=shampoo"],
    "channels": ["method=supervised", "student=named", "pruning=structured"],
}
# A published network of the same kind, whose depth alone takes a minute.
GOOGLENETS = {
    "GoogLeNet": [
        *("method=supervised", "student=googlenet", "quantizer=rtn", "data.image_size=32"),
        *("export=[packed,onnx]", "~quantizer.calibration_images"),
    ],
    "GoogLeNet as teacher": [
        *("method=dkd", "student=pair", "teacher=googlenet", "teacher.training.epochs=1", "data.image_size=32")
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [
        *(pytest.param(chosen, id=name) for name, chosen in CHOICES.items()),
        *(pytest.param(chosen, id=name, marks=pytest.mark.soak) for name, chosen in GOOGLENETS.items()),
    ],
)
def test_it_goes_all_the_way(folder, chosen):
    removed = [option[1:] for option in chosen if option.startswith("~")]
    short = [option for option in SHORT if option.partition("=")[0] not in removed]
    result = compress.run([*(option for option in chosen if option[0] != "~"), *short])
    assert len(result.rows) > 1 or removed
    file = next((result.directory / "models").glob("student-*.safetensors"))
    network, about = read_model(file)
    assert network(torch.zeros(2, *about["input_shape"])).shape == (2, 10)


@pytest.mark.slow
@pytest.mark.parametrize("student", ["auxiliary", pytest.param("googlenet", marks=pytest.mark.soak)])
def test_several_processes_train_a_network_with_an_auxiliary_head(folder, student, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "models"))  # for the other processes
    typed = ["method=supervised", f"student={student}", "trainer=ddp_cpu", "trainer.max_epochs=2", "quantizer=none"]
    typed += ["data.limit=100", "data.batch_size=20", "data.image_size=32", "export=none", "hydra.run.dir=run"]
    assert len(compress.run(typed).rows) == 1


REFUSED = {
    "student=features method=supervised": ["student features:", "tuple of (2, 6), (2, 3, 8, 8)", "(images, 10)"],
    "student=maps method=supervised": ["student maps:", "a tensor (2, 6, 6, 6)", "(images, 10)"],
    "student=intraining method=supervised": ["student intraining:", "list of (2, 6)", "(images, 10)"],
    "student=resnet8 method=kd teacher=features": ["teacher features:", "tuple", "(images, 10)"],
    "student=resnet8 method=dml peer=maps": ["peer maps:", "a tensor", "(images, 10)"],
    "student=resnet8 method=fitnet teacher=features": ["teacher features:", "tuple", "(images, 10)"],
    "student=fickle method=supervised quantizer=none export=none": [
        "export: the student's .safetensors file: ",
        "count",
    ],
    "student=resnet8 method=kd teacher=choosy": ["teacher: found a network that fails", "KeyError", "parts that fit"],
    "student=resnet8 method=dml peer=choosy": ["method: found dml, whose networks fail", "KeyError", "parts that fit"],
    "student=googlenet method=supervised pruning=structured data.image_size=32": [
        "pruning:",
        "structured",
        "GoogLeNet",
    ],
}


@pytest.mark.parametrize("typed", REFUSED)
def test_a_network_without_logits_is_refused_before_any_work(folder, capsys, typed):
    before = sorted(folder.iterdir())
    assert main([*typed.split(), "data.limit=100"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    assert all(part in said for part in REFUSED[typed]), said
    assert sorted(path for path in folder.iterdir() if path.name != "__pycache__") == before


def test_a_teacher_that_only_training_would_break_may_teach(folder):
    import my_outputs

    torch.save(my_outputs.InTraining(10).state_dict(), "trained.pt")
    chosen = ["student=resnet8", "method=kd", "teacher=intraining", "data.limit=100"]
    with pytest.raises(UserError, match=r"^teacher intraining: found a network that returns a list"):
        checked_jobs(chosen)
    checked_jobs([*chosen, "teacher.checkpoint=trained.pt"])
