"""Order, epochs and the choice of images: pure functions of (seed, epoch, index)."""

import pytest
import torch
from torch.utils.data import DataLoader

from compress.data import grouped_loader
from compress.data.dataset import identity_collate
from compress.data.digits import Digits
from compress.data.draws import stratified_order
from compress.errors import UserError


def data_module(**options):
    data = Digits(**({"image_size": 8, "crop_padding": 1, "horizontal_flip": True} | options))
    data.setup()
    return data


def epoch_of(data, epoch):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def test_an_epoch_is_the_same_whatever_came_before_it():
    loader = data_module(seed=3).train_dataloader()
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        for _ in loader:
            pass
    loader.sampler.set_epoch(2)
    continued = torch.cat([images for images, _ in loader])
    assert torch.equal(continued, epoch_of(data_module(seed=3), 2)[0])


def test_epochs_and_seeds_differ_in_order_and_augmentation():
    first = epoch_of(data_module(seed=0), 0)
    for other in (epoch_of(data_module(seed=0), 1), epoch_of(data_module(seed=1), 0)):
        assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize("together", [1, 3 * 32 * 8 * 8 * 3 * 4, 1 << 26])
def test_batches_made_together_are_those_made_one_by_one(together, monkeypatch):
    monkeypatch.setattr(grouped_loader, "BYTES", together)
    data = data_module(batch_size=32, randaugment=1)
    data.replay(2)
    images = data.train_dataloader().dataset
    for options in ({"batch_size": 32, "drop_last": True}, {"batch_sampler": [[3, 1], [5], [2, 0, 9], [4]]}):
        one_by_one = list(DataLoader(images, collate_fn=identity_collate, **options))
        grouped = list(grouped_loader.GroupedLoader(images, **options))
        assert [len(batch) for batch in grouped] == [3] * len(one_by_one)
        for batch, expected in zip(grouped, one_by_one, strict=True):
            assert all(map(torch.equal, batch, expected))


def test_an_epoch_visits_every_image_once_but_for_the_last_smaller_batch():
    data = data_module(crop_padding=0, horizontal_flip=False)
    images, _ = epoch_of(data, 0)
    assert len(images) == 1294 // 64 * 64
    assert len(images.flatten(1).unique(dim=0)) == len(images)


def test_a_training_set_smaller_than_a_batch_is_one_batch():
    assert len(data_module(batch_size=5000).train_dataloader()) == 1


def test_calibration_images_are_training_images_in_the_shares_of_their_classes():
    data = data_module()
    images = torch.cat(data.calibration_batches(200))
    again = torch.cat(data_module().calibration_batches(200, batch_size=7))
    assert torch.equal(images, again)
    assert len(images) == 200
    training = torch.cat(data.calibration_batches(10**6))
    assert len(training) == len(data.splits["train"])
    rows = {tuple(row) for row in training.flatten(1).tolist()}
    assert all(tuple(row) in rows for row in images.flatten(1).tolist())
    assert len(torch.cat(data.calibration_batches(4))) == 4


def test_every_prefix_of_the_stratified_order_holds_the_classes_in_their_shares():
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    order = stratified_order(labels, seed=0)
    assert sorted(order.tolist()) == list(range(100))
    for count in (10, 30, 50):
        assert labels[order[:count]].bincount().tolist() == [7 * count // 10, 2 * count // 10, count // 10]


def test_a_limit_keeps_a_stratified_slice_of_training_and_test_images():
    data = data_module(limit=200)
    assert len(data.splits["test"]) == 200
    assert len(data.splits["train"]) + len(data.splits["validation"]) == 200


def test_what_leaves_a_class_empty_is_refused():
    with pytest.raises(UserError, match=r"data.limit"):
        data_module(limit=3)
    with pytest.raises(UserError, match=r"data.validation_fraction"):
        data_module(validation_fraction=0.001)
    with pytest.raises(UserError, match=r"data.mean: found 2 values"):
        data_module(mean=[0.1, 0.2])
