"""What holds for every method: it learns, and a run that was stopped and resumed equals the undisturbed one."""

import shutil
from pathlib import Path

import pytest
import torch

import compress
from compress.cli import main
from compress.paths import CONF
from compress.results.record import Record
from compress.training.fit import Checkpoint, epoch_of

# What a resumed run makes of its best checkpoint is no matter of the method: tests/pipeline quantizes it.
SMALL = ["student=resnet8", "data.limit=200", "quantizer=none", "trainer.max_epochs=2"]
TEACHER = ["teacher=resnet8", "teacher.training.epochs=1"]
STEMS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
# Options of a short run of each method, and of variants of some.
METHODS = {
    "supervised": ["method=supervised"],
    "kd": ["method=kd", *TEACHER],
    "dkd": ["method=dkd", *TEACHER],
    "dml": ["method=dml"],
    "simultaneous": ["method=dml", "method.update=simultaneous", "method.peers=3", "peer=resnet8x4"],
    "kd_mixup": ["method=kd_mixup", *TEACHER],
    "logits": ["method=dkd", "mixup=logits", *TEACHER],
    "supervised_mixup": ["method=supervised_mixup"],
    "update_teacher": ["method=kd", "method.update_teacher=true", "teacher=resnet20", "teacher.training.epochs=1"],
    "update_teacher_mixup": ["method=dkd", "method.update_teacher=true", "mixup=logits", *TEACHER],
    "at": ["method=at", "loss=kd", "teacher=resnet20", "teacher.training.epochs=1"],
    "fitnet": ["method=fitnet", "mixup=images", "teacher=wrn_16_1", "teacher.training.epochs=1"],
    "rkd": ["method=rkd", *TEACHER],
    "qat": ["method=qat", "method.activation_bits=4", "method.freeze_bn_epoch=1", "method.weight_bits=2"],
    "qat_int8": ["method=qat_int8"],
    "qat_rate": ["method=qat_rate"],
    "qat_dkd": ["method=qat", "loss=dkd", "mixup=images", *TEACHER],
}
# Every kind of what a method keeps between two epochs: mixup of images and of logits, peers and their optimizers, a
# teacher that learns, adapters of features, steps and frozen statistics, the price of a bit, a loss that follows the
# epochs. The others combine the same, or keep nothing; `make soak` has them all.
KINDS = ("kd_mixup", "dml", "simultaneous", "update_teacher_mixup", "fitnet", "qat", "qat_rate", "qat_dkd")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in KINDS else pytest.mark.soak) for name in METHODS]
)
def test_a_run_stopped_after_an_epoch_and_resumed_equals_the_undisturbed_one(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    stopped = tmp_path / "stopped"
    save = Checkpoint.on_train_epoch_end

    def copy_after_the_first(self, trainer, module):
        save(self, trainer, module)
        if self.monitor is None and "teachers" not in str(self.dirpath) and trainer.current_epoch == 0:
            # What `kill -9` would leave now.
            shutil.copytree(Path(self.dirpath).parent, stopped)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "on_train_epoch_end", copy_after_the_first)
        whole = compress.run([*SMALL, *METHODS[name]])
    assert epoch_of(stopped / "checkpoints/last.ckpt") == 1
    assert main([f"resume={stopped}"]) == 0
    assert Record.read(stopped / "result.json").student == whole.record.student
    assert (stopped / "metrics.csv").read_text() == (whole.directory / "metrics.csv").read_text()
    for row in whole.rows:
        assert (stopped / row.file).read_bytes() == (whole.directory / row.file).read_bytes()
    # Whatever else learned, peers and teachers, and all optimizers.
    ends = [
        torch.load(each / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)
        for each in (stopped, whole.directory)
    ]
    ends = [[end["state_dict"], *(each["state"] for each in end["optimizer_states"])] for end in ends]
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_every_method_is_resumed_here():
    assert set(STEMS) <= set(METHODS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory in which one teacher is trained for all methods."""
    return tmp_path_factory.mktemp("learning")


@pytest.mark.slow
@pytest.mark.parametrize("stem", STEMS)
def test_it_learns_the_digits_in_seconds(folder, monkeypatch, stem):
    monkeypatch.chdir(folder)
    options = ["student=resnet8", "trainer.max_epochs=6", "quantizer=none", f"method={stem}"]
    options += ["data.limit=600", "data.batch_size=32"]
    if any(option.startswith("teacher=") for option in METHODS[stem]):
        options += ["teacher=wrn_16_1", "teacher.training.epochs=4"]
    # Its weight is for maps of up to 32x32 pixels; on the few pixels here the mean square is that much larger.
    options += ["method.beta=100"] if stem == "at" else []
    # Fewer bits are for weights that are trained.
    options += ["method.weight_rate=3"] if stem == "qat_rate" else []
    result = compress.run(options)
    assert result.rows[-1].test_accuracy > 0.7, result.rows
