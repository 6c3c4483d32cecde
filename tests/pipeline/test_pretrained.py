"""Students that start from the weights of a network of other classes."""

import pytest
import torch

import compress
from compress.errors import UserError
from compress.export.packed import read_model
from compress.models import build
from compress.pipeline.check import checked_jobs

SMALL = ["data=digits", "method=supervised", "student=resnet8", "quantizer=none", "trainer.max_epochs=1"]


@pytest.fixture
def hundred(tmp_path):
    path = tmp_path / "hundred.pth.tar"
    weights = build("resnet8", 100).state_dict()
    torch.save({"state_dict": {f"net.{name}": tensor for name, tensor in weights.items()}}, path)
    return path


def test_another_number_of_classes_is_refused_with_the_way_out(hundred):
    with pytest.raises(UserError, match=r"has 100 classes, the data have 10; accepted: .*, or student\.head=new$"):
        checked_jobs([*SMALL, f"student.checkpoint={hundred}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.head=new", "student.head: found new without a student.checkpoint; accepted: keep, or a checkpoint"),
        ("student.head=fresh", "student.head: found 'fresh'; accepted: keep, new"),
    ],
)
def test_a_wrong_head_is_refused(override, message):
    with pytest.raises(UserError) as failure:
        checked_jobs([*SMALL, override])
    assert str(failure.value) == message


@pytest.mark.slow
def test_a_student_with_a_new_head_is_trained_and_its_file_needs_no_checkpoint(hundred, tmp_path):
    overrides = [f"student.checkpoint={hundred}", "student.head=new", "data.limit=200", "trainer.accelerator=cpu"]
    result = compress.run([*SMALL, *overrides, f"output_directory={tmp_path / 'out'}"])
    hundred.unlink()
    [file] = (result.directory / "models").glob("*.safetensors")
    model, about = read_model(file)
    assert about["architecture"]["num_classes"] == 10
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


def test_a_teacher_of_more_classes_is_checked_with_those_of_the_data(hundred):
    distil = ["data=digits", "method=kd", "student=resnet8", "teacher=resnet8", f"teacher.checkpoint={hundred}"]
    [job] = checked_jobs([*distil, "teacher.classes=[10,11,12,13,14,15,16,17,18,99]"])
    assert job.config.teacher.classes[-1] == 99
    with pytest.raises(UserError, match=r"^teacher\.checkpoint: .* has 100 classes.*, or teacher\.classes$"):
        checked_jobs(distil)
    with pytest.raises(UserError, match=r"^teacher\.classes: found 2 classes, the data have 10"):
        checked_jobs([*distil, "teacher.classes=[1,2]"])
    with pytest.raises(UserError, match=r"^teacher\.classes: found some without teacher\.checkpoint"):
        checked_jobs([*distil[:-1], "teacher.classes=[1,2]"])
