"""Words that would change nothing are refused: where nothing reads a `_target_`, a `stem` or a word of Hydra's."""

import pytest

from compress.config.compose import compose_jobs
from compress.config.values import check_values
from compress.errors import UserError

STEM = "accepted: a stem, student=STEM, or for a class of your own student=module student.target=MODULE.CLASS"
IGNORED = [
    (["student._target_=mynet.MyNet"], f"student._target_: found 'mynet.MyNet'; {STEM}"),
    (["peer=resnet8", "peer._target_=mynet.MyNet"], "peer._target_: found 'mynet.MyNet'; accepted: a stem"),
    (["teacher.model._target_=a.B"], "teacher.model._target_: found 'a.B'; accepted: a stem"),
    (["teacher=ensemble", "teacher.members=[resnet8,{model: {stem: resnet20, _target_: a.B}}]"], "teacher.members[1]."),
    (["trainer._target_=a.B"], "trainer._target_: found 'a.B', which nothing reads; accepted: no such key"),
    (["+teacher._target_=a.B"], "teacher._target_: found 'a.B', which nothing reads"),
    (["+teacher.training._target_=a.B"], "teacher.training._target_: found 'a.B', which nothing reads"),
    (["student.stem=resnet8"], "student.stem: found 'resnet8'; accepted: no such key, student=STEM"),
    (["peer=resnet8", "peer.stem=resnet20"], "peer.stem: found 'resnet20'; accepted: no such key"),
    (["teacher.model.stem=resnet34"], "teacher.model.stem: found 'resnet34'; accepted: no such key, teacher=STEM"),
    (["+quantizer.grid.stem=gpfq"], "quantizer.grid.stem: found 'gpfq', which nothing reads"),
    (["+student._recursive_=false"], "student._recursive_: found False, which nothing reads"),
    (["+optimizer._convert_=all"], "optimizer._convert_: found 'all', which nothing reads"),
    (["+loss._partial_=true"], "loss._partial_: found True, which nothing reads"),
    (["stages=[{name: a, overrides: [], stem: b}]"], "stages[0].stem: found 'b', which nothing reads"),
]


def checked(typed):
    [job] = compose_jobs(typed)
    check_values(job.config)


@pytest.mark.parametrize(("typed", "message"), IGNORED)
def test_what_nothing_reads_is_refused_in_one_line(typed, message):
    with pytest.raises(UserError) as mistake:
        checked(["method=kd", *typed])
    assert str(mistake.value).startswith(message)
    assert len(str(mistake.value).splitlines()) == 1


@pytest.mark.parametrize(
    "typed",
    [
        ["method=kd", "teacher=resnet8", "student=resnet20"],
        ["method=dml", "peer=resnet8", "trainer=ddp_cpu"],
        ["method=kd", "teacher=ensemble", "teacher.members=[resnet8,{model: resnet20}]", "optimizer=sgd"],
        ["method=kd", "logger=[csv,tensorboard]", "export=[packed,onnx]", "pruning=magnitude", "mixup=images"],
        ["method=kd", "scheduler@teacher.training.scheduler=cosine", "student._target_=${teacher.model._target_}",
         "student=resnet18", "teacher=resnet50"],
        ["student=module", "student.target=collections.OrderedDict", "student.arguments={}"],
    ],
)  # fmt: skip
def test_what_the_options_themselves_say_is_accepted(typed):
    checked(typed)
