"""The batched augmentation against torchvision's, image by image, for the same choices."""

import pytest
import torch
from torchvision.transforms.v2 import RandAugment, functional

from compress.data.augmentation import Augmentation, crop_and_mirror, cut_out_, gathered
from compress.data.normalisation import Normalisation
from compress.data.randaugment import OPERATIONS, rand_augment

MEAN, DEVIATION = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
NORMALISATION = Normalisation(MEAN, DEVIATION, 32)


def some_images(count=16, size=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator).to(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize("padding", [4, 1])
@pytest.mark.parametrize("flip", [True, False])
def test_crop_flip_and_normalise_equal_torchvisions_image_by_image(padding, flip):
    images = some_images(64)
    augmentation = Augmentation(crop_padding=padding, horizontal_flip=flip)
    choices = augmentation.draw(64, 32, seed=3, epoch=2)
    actual = augmentation(images, choices, NORMALISATION)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert choices.mirrored is None if not flip else 0 < choices.mirrored.sum() < 64
    for index, image in enumerate(images):
        top, left = choices.top[index].item(), choices.left[index].item()
        expected = functional.crop(functional.pad(image, [padding]), top, left, 32, 32)
        expected = functional.horizontal_flip(expected) if flip and choices.mirrored[index] else expected
        expected = functional.to_dtype(expected, torch.float32, scale=True)
        expected = functional.normalize(expected, MEAN, DEVIATION)
        torch.testing.assert_close(actual[index], expected, rtol=0, atol=1e-6)


def test_offsets_cover_every_place_of_the_padded_image():
    choices = Augmentation(crop_padding=2).draw(2000, 32, seed=0, epoch=0)
    assert set(zip(choices.top.tolist(), choices.left.tolist(), strict=True)) == {
        (y, x) for y in range(5) for x in range(5)
    }


def test_the_corners_of_the_padding_are_reachable():
    images = some_images(2)
    corners = torch.tensor([0, 8])
    shifted = crop_and_mirror(images, corners, corners, None, 4)
    assert torch.equal(shifted[0, :, 4:, 4:], images[0, :, :-4, :-4])
    assert torch.equal(shifted[1, :, :-4, :-4], images[1, :, 4:, 4:])
    assert (shifted[0, :, :4] == 0).all()


@pytest.mark.parametrize(("height", "width", "padding"), [(32, 32, 4), (8, 8, 1), (7, 9, 2), (8, 8, 0)])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("flip", [True, False])
def test_what_a_gpu_gathers_is_what_a_cpu_does(height, width, padding, shifted, flip):
    generator = torch.Generator().manual_seed(0)
    images = some_images(64, max(height, width))[:, :, :height, :width].contiguous(memory_format=torch.channels_last)
    top, left = torch.randint(2 * padding + 1, (2, 64), generator=generator) if shifted else (None, None)
    mirrored = torch.randint(2, (64,), generator=generator).bool() if flip else None
    expected = crop_and_mirror(images, top, left, mirrored, padding)
    actual = gathered(images, top, left, mirrored, padding)
    assert torch.equal(actual, expected)
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_cut_out_fills_a_square_around_its_centre_and_stops_at_the_border():
    images = torch.ones(2, 3, 10, 10)
    cut = cut_out_(images, torch.tensor([5, 0]), torch.tensor([5, 9]), 4)
    assert (cut[0, :, 3:7, 3:7] == 0).all()
    assert cut[0].sum() == 3 * (100 - 16)
    assert (cut[1, :, :2, 7:] == 0).all()
    assert cut[1].sum() == 3 * (100 - 6)


def test_choices_follow_from_seed_epoch_and_index_alone():
    augmentation = Augmentation(crop_padding=4, horizontal_flip=True, cutout=8, randaugment=2)
    first, again = (augmentation.draw(100, 32, seed=1, epoch=5) for _ in range(2))
    other = augmentation.draw(100, 32, seed=1, epoch=6)
    for name in ("top", "left", "mirrored", "row", "column", "operations", "negative"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    images = some_images(100)
    whole = augmentation(images, first, NORMALISATION)
    indices = torch.tensor([70, 3, 44])
    torch.testing.assert_close(augmentation(images[indices], first[indices], NORMALISATION), whole[indices])


def test_randaugment_in_a_batch_equals_randaugment_alone():
    images = some_images(2 * len(OPERATIONS))
    operations = torch.arange(len(OPERATIONS)).repeat(2)[:, None]
    signs = torch.arange(2).repeat_interleave(len(OPERATIONS))[:, None].bool()
    together = rand_augment(images, operations, signs, 9)
    assert together.dtype == torch.uint8
    for index, image in enumerate(images):
        operation, signed = list(OPERATIONS.values())[operations[index, 0]]
        alone = operation(image[None], -0.3 if signed and signs[index, 0] else 0.3)
        assert torch.equal(together[index], alone[0])
    # Of the operations only the identity leaves all of these images, which span 0..255, as they are.
    for name, first in zip(OPERATIONS, range(len(OPERATIONS)), strict=True):
        changed = not torch.equal(together[first], images[first])
        assert changed or name in ("identity", "autocontrast", "equalize")


@pytest.mark.parametrize("magnitude", [0, 7, 15, 30])
def test_randaugment_can_do_what_torchvisions_can_and_nothing_else(magnitude):
    image = torch.randint(30, 220, (3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    theirs = {RandAugment(1, magnitude)(image).numpy().tobytes() for _ in range(700)}
    operations = torch.arange(len(OPERATIONS)).repeat(2)[:, None]
    negative = torch.arange(2).repeat_interleave(len(OPERATIONS))[:, None].bool()
    ours = rand_augment(image.repeat(len(operations), 1, 1, 1), operations, negative, magnitude)
    assert {each.contiguous().numpy().tobytes() for each in ours} == theirs
