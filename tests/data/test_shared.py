"""Data that several runs of a process use: read once, shared where the images are the same."""

import pickle

import pytest
import torch

from compress.config.compose import compose_jobs
from compress.data.digits import Digits
from compress.data.shared import DataSets
from compress.errors import UserError


def node(*overrides):
    return compose_jobs(overrides)[0].config.data


@pytest.fixture
def reads(monkeypatch):
    """A list that grows with every reading of the digits."""
    happened, read = [], Digits.read
    monkeypatch.setattr(Digits, "read", lambda self: happened.append(self) or read(self))
    return happened


def test_modules_that_batch_the_same_images_differently_share_one_reading(reads):
    sets = DataSets()
    first = sets.module(node(), seed=1)
    augmented = ["data.crop_padding=1", "data.horizontal_flip=true", "data.cutout=2", "data.randaugment=1"]
    normalised = ["data.mean=[0.5]", "data.standard_deviation=[0.25]", "data.evaluation_batch_size=7"]
    second = sets.module(node(*augmented, *normalised, "data.randaugment_magnitude=3"), seed=2, batch_size=16)
    assert len(reads) == 1
    assert first.splits is second.splits
    assert (second.batch_size, second.evaluation_batch_size, second.seed) == (16, 7, 2)
    assert second.mean == (0.5,) * 3 != first.mean

    alone = Digits(image_size=8, validation_fraction=0.15, seed=1)
    alone.setup()
    assert first.mean == alone.mean
    for shared, own in zip(first.train_dataloader(), alone.train_dataloader(), strict=True):
        assert all(torch.equal(*pair) for pair in zip(shared, own, strict=True))


@pytest.mark.parametrize(
    "override", ["data.image_size=16", "data.limit=100", "data.split_seed=1", "data.validation_fraction=0.3"]
)
def test_what_decides_the_images_is_read_again(reads, override):
    sets = DataSets()
    first, other = sets.module(node()), sets.module(node(override))
    assert len(reads) == 2
    assert first.splits["train"].images.shape != other.splits["train"].images.shape or not torch.equal(
        first.splits["train"].images, other.splits["train"].images
    )


def test_the_two_used_last_are_held(reads):
    sets = DataSets()
    small, medium, large = (node(f"data.image_size={size}") for size in (8, 12, 16))
    for one in (small, medium, small, large, small):
        sets.module(one)
    assert len(reads) == 3
    sets.module(medium)
    assert len(reads) == 4


def test_a_copy_sent_to_another_process_holds_no_images(reads):
    sets = DataSets()
    sets.module(node())
    sent = pickle.dumps(sets)
    assert len(sent) < 1000
    pickle.loads(sent).module(node())
    assert len(reads) == 2


def test_what_is_wrong_with_the_data_is_one_line():
    with pytest.raises(UserError, match=r"^data\.mean: found 2 values"):
        DataSets().module(node("data.mean=[0.5,0.5]"))
    with pytest.raises(UserError, match=r"^data\.limit: found 5"):
        DataSets().module(node("data.limit=5"))
