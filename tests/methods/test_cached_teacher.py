"""A teacher behind its cache says what it says live, up to float16, for every image and view."""

import pytest
import torch

from compress import models
from compress.data.shared import DataSets
from compress.losses import kd
from compress.methods.cached_teacher import CachedTeacher
from compress.methods.frozen_teacher import FrozenEnsemble, FrozenTeacher
from compress.methods.kd import KD
from compress.methods.logit_file import LogitFile
from compress.methods.mixup import Blend, Mixup
from compress.optim.schedules import Cosine

AUGMENTED = {"crop_padding": 1, "horizontal_flip": True, "cutout": 2}
CPU = torch.device("cpu")


def digits(**options):
    node = {"_target_": "compress.data.digits.Digits", "image_size": 8, "limit": 700, "batch_size": 30, **options}
    return DataSets().module(node, seed=3)


def network(seed=7):
    torch.manual_seed(seed)
    return models.build("resnet8", 10).eval()


def frozen(seed=7):
    return FrozenTeacher(network(seed), (3, 8, 8))


def cached(data, folder, teacher=None, views=1):
    data.replay(views)

    def opened(view):
        path = None if view is None else folder / f"{view}.logits"
        return LogitFile(path, len(data.splits["train"]), 10, {"view": view})

    return CachedTeacher(teacher or frozen(), views, opened, data.training_view, CPU)


def batches_of(data, epoch):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def close(logits, live):
    # One step of float16 beside the rounding of another order of summation.
    torch.testing.assert_close(logits, live, rtol=2**-10, atol=1e-4)


@pytest.mark.parametrize("teacher", [frozen, lambda: FrozenEnsemble([frozen(1), frozen(2)])], ids=["one", "ensemble"])
def test_cached_logits_are_the_live_ones_rounded_for_every_image_and_view(tmp_path, teacher):
    data, live = digits(**AUGMENTED), teacher()
    one = cached(data, tmp_path, live, views=2)
    seen = []
    for epoch in range(4):
        one.begin_epoch(epoch)
        for images, _, index in batches_of(data, epoch):
            logits = one.at(index, images)
            close(logits, live(images))
            assert torch.equal(logits, logits.half().float())
        seen.append(one.table.clone())
    assert not torch.equal(seen[0], seen[1])  # other views
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    count = len(data.splits["train"])
    assert (one.computed, one.record()["bytes"]) == (2 * count, 2 * LogitFile.size(count, 10))


def test_an_epoch_shows_the_view_of_its_number_in_an_order_of_its_own():
    plain, data = digits(**AUGMENTED), digits(**AUGMENTED)
    data.replay(2)
    by_index = {}
    for epoch in range(2):
        for images, _, index in batches_of(data, epoch):
            by_index |= {(epoch, int(number)): image for number, image in zip(index, images, strict=True)}
        for (images, labels), (same, too, _) in zip(batches_of(plain, epoch), batches_of(data, epoch), strict=True):
            assert torch.equal(images, same)
            assert torch.equal(labels, too)
    for images, labels, index in batches_of(data, 3):
        for image, label, number in zip(images, labels, index, strict=True):
            assert torch.equal(image, by_index[1, int(number)])
            assert label == data.splits["train"].labels[number]
    orders = [torch.cat([index for *_, index in batches_of(data, epoch)]) for epoch in (1, 3)]
    assert not torch.equal(*orders)


def test_a_second_one_finds_what_the_first_has_computed_and_computes_the_rest(tmp_path):
    data = digits()
    first = cached(data, tmp_path)
    first.begin_epoch(0)
    second = cached(data, tmp_path)
    second.begin_epoch(5)
    assert (first.computed, second.computed) == (len(data.splits["train"]), 0)
    assert torch.equal(first.table, second.table)
    path = tmp_path / "0.logits"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the last chunk
    path.write_bytes(content)
    third = cached(data, tmp_path)
    third.begin_epoch(0)
    assert third.computed == len(data.splits["train"]) % 256
    assert torch.equal(first.table, third.table)


def test_logits_of_another_teacher_in_a_file_that_claims_to_be_right_are_not_read(tmp_path, capsys):
    data = digits()
    cached(data, tmp_path, frozen(1)).begin_epoch(0)
    before = (tmp_path / "0.logits").read_bytes()
    other = cached(data, tmp_path, frozen(2))
    other.begin_epoch(0)
    images, _, index = batches_of(data, 0)[0]
    close(other.at(index, images), frozen(2)(images))
    assert "0.logits has the logits of another teacher, which stay unread" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "0.logits").read_bytes() == before


def test_without_room_it_answers_live_and_rounded():
    data = digits()
    one = CachedTeacher(frozen(), 1, lambda view: None, data.training_view, CPU)
    one.begin_epoch(0)
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(one.at(torch.arange(4), images), frozen()(images).half().float())
    assert one.record()["bytes"] == one.read == 0


def test_blended_logits_are_blended_from_clean_ones(tmp_path):
    data = digits()
    teacher = cached(data, tmp_path)
    supplied = {
        "student": network(),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "scheduler": Cosine(),
        "num_classes": 10,
        "input_shape": (3, 8, 8),
        "mixup": Mixup(teacher_sees="clean"),
        "loss": kd.KD(),
    }
    modules = [KD(teacher=one, **supplied) for one in (teacher, frozen())]
    images, _, index = batches_of(data, 0)[0]
    blend = Blend(0.7, torch.arange(len(images)).flip(0))
    teacher.begin_epoch(0)
    for module in modules:
        module.index = index
    close(*(module.teacher_logits(images, blend(images), blend) for module in modules))


def test_teachers_are_told_apart_by_what_they_compute():
    assert frozen(1).digest() == frozen(1).digest() != frozen(2).digest()
    factors = torch.ones(3), torch.zeros(3)
    assert FrozenTeacher(network(), (3, 8, 8), factors).digest() != frozen().digest()
    assert FrozenEnsemble([frozen(1), frozen(2)]).digest() != FrozenEnsemble([frozen(2), frozen(1)]).digest()


def test_images_are_told_apart_by_all_that_they_follow_from():
    same = digits(batch_size=10).training_identity()
    assert digits().training_identity() == same
    others = [{"limit": 800}, {"image_size": 12}, {"split_seed": 1}, {"mean": [0.4]}, AUGMENTED, {"cutout": 2}]
    identities = {digits(**options).training_identity() for options in others} | {same}
    assert len(identities) == 1 + len(others)
    node = {"_target_": "compress.data.digits.Digits", "image_size": 8, "limit": 700}
    seeds = [
        [DataSets().module({**node, **options}, seed=seed).training_identity() for seed in (0, 1)]
        for options in ({}, AUGMENTED)
    ]
    assert [first == second for first, second in seeds] == [True, False]
