"""Runs whose teacher answers each image once: when they do, what they share, and that nothing else changes."""

import json
from pathlib import Path

import pytest
import torch

import compress
from compress.methods.frozen_teacher import FrozenTeacher

pytestmark = pytest.mark.slow

RUN = [
    *("method=kd", "student=resnet8", "teacher=resnet8", "teacher.training.epochs=1", "trainer.max_epochs=2"),
    *("data.limit=200", "quantizer=none", "trainer.log_every=0"),
]
AUGMENTED = ["data.crop_padding=1", "data.horizontal_flip=true"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def weights(result):
    saved = torch.load(result.directory / "checkpoints" / "best.ckpt", map_location="cpu", weights_only=True)
    return saved["state_dict"]


def cache_of(result):
    return json.loads((result.directory / "result.json").read_text())["teacher"].get("cache")


def test_without_augmentation_logits_are_computed_once_for_all_runs_and_seeds():
    first, again, seed, dkd = (
        compress.run([*RUN, *options]) for options in ([], [], ["seed=1"], ["loss=dkd", "data.batch_size=32"])
    )
    images = first.record.data.images["train"]
    [file] = Path("outputs/teachers").glob("*.logits")
    assert cache_of(first) == {
        "views": 1,
        "files": [str(file)],
        "bytes": file.stat().st_size,
        "computed": images,
        "read": 2 * (images // 64 * 64),
        "seconds": cache_of(first)["seconds"],
    }
    assert [cache_of(other)["computed"] for other in (again, seed, dkd)] == [0, 0, 0]
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(first).items())


def test_a_run_with_a_full_cache_is_one_whose_live_logits_are_rounded_to_float16(monkeypatch):
    for _ in range(2):
        cached = compress.run(RUN)
    assert cache_of(cached)["computed"] == 0
    answer = FrozenTeacher.__call__
    monkeypatch.setattr(FrozenTeacher, "__call__", lambda self, images: answer(self, images).half().float())
    live = compress.run([*RUN, "method.teacher_cache=null"])
    assert cache_of(live) is None
    for name, value in weights(live).items():
        # A rare logit is rounded to its neighbour, because it was summed in another order.
        torch.testing.assert_close(weights(cached)[name], value, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (AUGMENTED, "images are augmented at random; method.teacher_cache=VIEWS replays so many views of each"),
        (["mixup=images"], "the teacher sees blended images"),
        (["+trainer.limit_train_batches=1"], "trainer.limit_train_batches leaves out images"),
        (["mixup=logits"], None),
        ([*AUGMENTED, "method.teacher_cache=1"], None),
        (["method=qat", "loss=kd", "teacher=resnet8"], None),
    ],
)
def test_where_the_teacher_answers_in_every_step_the_run_says_why(options, reason, capsys):
    result = compress.run([*RUN, "trainer.max_epochs=1", *options])
    said = " ".join(capsys.readouterr().out.split())
    assert (f"teacher cache: off, {reason}" in said) == (reason is not None)
    assert (cache_of(result) is None) == (reason is not None)
    assert len(list(Path("outputs/teachers").glob("*.logits"))) == (reason is None)


def test_views_take_turns_and_each_has_a_file_that_other_numbers_of_views_share():
    two = compress.run([*RUN, *AUGMENTED, "method.teacher_cache=2"])
    three = compress.run([*RUN, *AUGMENTED, "method.teacher_cache=3", "trainer.max_epochs=4"])
    images = two.record.data.images["train"]
    assert [cache_of(result)["computed"] for result in (two, three)] == [2 * images, images]
    assert len(set(cache_of(three)["files"])) == 3
    other_seed = compress.run([*RUN, *AUGMENTED, "method.teacher_cache=2", "seed=1"])
    assert cache_of(other_seed)["computed"] == 2 * images


def test_processes_that_train_together_fill_one_cache():
    typed = [*RUN, *AUGMENTED, "method.teacher_cache=2"]
    together = compress.run([*typed, "trainer=ddp_cpu", "data.batch_size=64"])
    assert len(list(Path("outputs/teachers").glob("*.logits"))) == 2
    alone = compress.run(typed)
    assert cache_of(alone)["computed"] == 0
    assert together.record.student.epochs == alone.record.student.epochs == 2
