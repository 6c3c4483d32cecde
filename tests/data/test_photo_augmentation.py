"""Random resized crops and colour jitter in batches against torchvision's, image by image, for the same choices."""

import pytest
import torch
from torchvision.transforms.v2 import RandomResizedCrop, functional

from compress.data.augmentation import Augmentation
from compress.data.colour_jitter import OPERATIONS, colour_jitter, draw_jitter
from compress.data.digits import Digits
from compress.data.normalisation import Normalisation
from compress.data.resized_crop import draw_boxes, resized_crops
from compress.errors import UserError

ADJUST = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
)


def some_images(count=24, size=40):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    images[0], images[1], images[2, 1:] = 0, 255, images[2, :1]  # black, white and grey
    return images.to(memory_format=torch.channels_last)


def test_crops_equal_torchvisions():
    images, boxes = some_images(), draw_boxes(24, 40, (0.08, 1.0), seed=3, epoch=1)
    crops = resized_crops(images, boxes, 32)
    assert crops.is_contiguous(memory_format=torch.channels_last)
    for image, box, crop in zip(images, boxes.tolist(), crops, strict=True):
        top, left, height, width = box
        part = image[:, top : top + height, left : left + width].contiguous()
        assert torch.equal(crop, functional.resize(part, [32, 32], antialias=True))


def test_boxes_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    crop = RandomResizedCrop(32, scale=(0.2, 0.9))
    theirs = [crop.make_params([torch.zeros(3, 50, 50)]) for _ in range(4000)]
    theirs = torch.tensor([[each[key] for key in ("top", "left", "height", "width")] for each in theirs]).double()
    ours = draw_boxes(4000, 50, (0.2, 0.9), seed=0, epoch=0)
    assert (ours >= 0).all()
    assert (ours[:, 2:] > 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= 50).all()
    ours = ours.double()
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    for measure in (
        lambda box: box[:, 2] * box[:, 3] / 2500,
        lambda box: (box[:, 3] / box[:, 2]).log(),
        lambda box: box[:, 0] / 50,
        lambda box: box[:, 1] / 50,
    ):
        assert (measure(ours).quantile(quantiles) - measure(theirs).quantile(quantiles)).abs().max() < 0.04


def test_all_of_the_image_is_taken_where_no_box_fits():
    # Of the whole area only a square fits, and no ratio is ever exactly 1.
    boxes = draw_boxes(50, 4000, (1.0, 1.0), seed=0, epoch=0)
    assert [0, 0, 4000, 4000] in boxes.tolist()
    assert (boxes[:, :2] + boxes[:, 2:] <= 4000).all()


@pytest.mark.parametrize("index", range(4))
def test_each_adjustment_equals_torchvisions(index):
    images = some_images()
    factors, _ = draw_jitter(24, (0.9, 0.9, 0.9, 0.5), seed=0, epoch=0)
    changed = OPERATIONS[index](images, factors[:, index].view(-1, 1, 1, 1))
    assert changed.dtype == torch.uint8
    for image, factor, mine in zip(images, factors[:, index].tolist(), changed, strict=True):
        theirs = ADJUST[index](image, factor)
        assert (mine.int() - theirs.int()).abs().max() <= 1
        assert (mine != theirs).double().mean() < 0.02  # floats that lie on the edge between two levels


def test_every_image_has_its_own_order_and_operations_of_no_strength_are_left_out():
    images, strengths = some_images(), (0.4, 0.4, 0.0, 0.1)
    factors, order = draw_jitter(24, strengths, seed=0, epoch=0)
    together = colour_jitter(images, factors, order, strengths)
    assert together.is_contiguous(memory_format=torch.channels_last)
    assert len(order.unique(dim=0)) > 10
    for image, row, steps, mine in zip(images, factors.tolist(), order.tolist(), together, strict=True):
        for step in steps:
            image = image if step == 2 else ADJUST[step](image, row[step])
        assert (mine.int() - image.int()).abs().double().mean() < 0.1


def test_factors_stay_within_their_ranges():
    factors, _ = draw_jitter(5000, (0.4, 1.5, 0.0, 0.2), seed=0, epoch=0)
    low, high = factors.amin(0), factors.amax(0)
    assert torch.allclose(low, torch.tensor([0.6, 0, 1, -0.2]), atol=2e-3)
    assert torch.allclose(high, torch.tensor([1.4, 2.5, 1, 0.2]), atol=2e-3)


def test_choices_follow_from_seed_epoch_and_index_alone():
    augmentation = Augmentation(
        random_resized_crop=(0.1, 1.0), colour_jitter=(0.4, 0.4, 0.4, 0.1), horizontal_flip=True
    )
    first, again = (augmentation.draw(24, 32, seed=1, epoch=5, stored_size=40) for _ in range(2))
    other = augmentation.draw(24, 32, seed=1, epoch=6, stored_size=40)
    fewer = augmentation.draw(10, 32, seed=1, epoch=5, stored_size=40)
    for name in ("boxes", "factors", "order", "mirrored"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert torch.equal(getattr(first, name)[:10], getattr(fewer, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    normalisation, images = Normalisation([0.5] * 3, [0.25] * 3, 32), some_images()
    whole = augmentation(images, first, normalisation)
    assert whole.shape == (24, 3, 32, 32)
    index = torch.tensor([20, 3, 11])
    torch.testing.assert_close(augmentation(images[index], first[index], normalisation), whole[index])


def test_training_images_are_kept_larger_than_those_of_evaluation():
    data = Digits(image_size=8, stored_size=12, random_resized_crop=[0.3, 1.0])
    data.setup()
    assert [data.splits[name].images.shape[-1] for name in ("train", "validation", "test")] == [12, 8, 8]
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader))[0].shape[1:] == (3, 8, 8)
    assert data.calibration_batches(4)[0].shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random_resized_crop": [0.5]}, r"random_resized_crop: found \[0\.5\]; accepted: the least"),
        ({"random_resized_crop": [0.9, 0.5]}, "random_resized_crop: found"),
        ({"colour_jitter": [0.4]}, r"colour_jitter: found \[0\.4\]; accepted: the strengths"),
        ({"colour_jitter": [0.4, 0.4, 0.4, 0.6]}, "the last at most 0.5"),
        ({"stored_size": 12}, r"stored_size: found 12; accepted: null, or .* with data\.random_resized_crop"),
        ({"stored_size": 6, "random_resized_crop": [0.1, 1.0]}, "stored_size: found 6"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Digits(image_size=8, **options)
