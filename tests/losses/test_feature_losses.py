"""Losses on features against their formulas, written out again here element by element in float64."""

import math

import pytest
import torch

from compress.losses.attention import attention_loss
from compress.losses.relational import angle_loss, distance_loss


def features(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def huber(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def slow_map(image):
    """Mean of squares over the channels of nested lists [C][H][W], flattened and of length 1."""
    height, width = len(image[0]), len(image[0][0])
    energy = [sum(channel[i][j] ** 2 for channel in image) / len(image) for i in range(height) for j in range(width)]
    length = math.sqrt(sum(value * value for value in energy))
    return [value / length for value in energy]


def test_attention_is_its_formula():
    student, teacher = features(3, 4, 5, 6), features(3, 7, 5, 6, seed=1)
    squares = [
        (a - b) ** 2
        for one, other in zip(student.tolist(), teacher.tolist(), strict=True)
        for a, b in zip(slow_map(one), slow_map(other), strict=True)
    ]
    assert attention_loss(student, teacher).item() == pytest.approx(sum(squares) / len(squares), rel=1e-12)


def test_attention_of_another_size_is_compared_at_the_smaller():
    student, teacher = features(2, 4, 8, 8), features(2, 4, 4, 4, seed=1)
    energy = student.square().mean(1).reshape(2, 4, 2, 4, 2).mean((2, 4)).flatten(1)
    other = teacher.square().mean(1).flatten(1)
    expected = (energy / energy.norm(dim=1, keepdim=True) - other / other.norm(dim=1, keepdim=True)).square().mean()
    torch.testing.assert_close(attention_loss(student, teacher), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(attention_loss(teacher, student), expected, rtol=1e-12, atol=0)


def slow_distances(rows):
    table = [[math.dist(a, b) for b in rows] for a in rows]
    positive = [value for line in table for value in line if value > 0]
    mean = sum(positive) / len(positive)
    return [[value / mean for value in line] for line in table]


def slow_cosines(rows):
    def direction(start, end):
        length = math.dist(start, end)
        return [(b - a) / length if length else 0.0 for a, b in zip(start, end, strict=True)]

    return [
        sum(a * b for a, b in zip(direction(at, one), direction(at, other), strict=True))
        for at in rows
        for one in rows
        for other in rows
    ]


def test_distances_and_angles_are_their_formulas():
    student, teacher = features(6, 5), 3 * features(6, 9, seed=1)
    one, other = slow_distances(student.tolist()), slow_distances(teacher.tolist())
    terms = [huber(a - b) for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True)]
    assert distance_loss(student, teacher).item() == pytest.approx(sum(terms) / 36, rel=1e-12)
    one, other = slow_cosines(student.tolist()), slow_cosines(teacher.tolist())
    terms = [huber(a - b) for a, b in zip(one, other, strict=True)]
    assert angle_loss(student, teacher).item() == pytest.approx(sum(terms) / 216, rel=1e-12)


@pytest.mark.parametrize("loss", [distance_loss, angle_loss])
def test_relations_ignore_scale_and_rotation(loss):
    student = features(8, 4)
    rotation = torch.linalg.qr(features(4, 4, seed=2)).Q
    assert loss(student, 5 * student @ rotation).item() == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize(
    ("loss", "student", "teacher"),
    [
        (attention_loss, features(2, 3, 4, 4), features(2, 5, 4, 4, seed=1)),
        (attention_loss, features(2, 3, 4, 4), features(2, 5, 2, 2, seed=1)),
        (distance_loss, features(4, 3), features(4, 6, seed=1)),
        (angle_loss, features(4, 3), features(4, 6, seed=1)),
    ],
)
def test_gradients_are_right_and_reach_the_student_alone(loss, student, teacher):
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda each: loss(each, teacher.detach()), student)
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", [distance_loss, angle_loss])
def test_two_images_alike_have_finite_gradients(loss):
    student = features(4, 3)
    student[1] = student[0]
    student.requires_grad_()
    loss(student, features(4, 3, seed=1)).backward()
    assert torch.isfinite(student.grad).all()


def test_half_precision_is_computed_in_float32():
    student, teacher = features(2, 3, 4, 4).bfloat16(), features(2, 3, 4, 4, seed=1).bfloat16()
    assert attention_loss(student, teacher).dtype == torch.float32
    torch.testing.assert_close(attention_loss(student, teacher), attention_loss(student.float(), teacher.float()))


@pytest.mark.parametrize("loss", [distance_loss, angle_loss])
def test_relations_are_computed_in_float32_under_autocast(loss):
    student, teacher = features(8, 16), features(8, 16, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(student.float(), teacher.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), loss(student.double(), teacher.double()), rtol=1e-5, atol=1e-7)
