"""The losses against their formulas, written out again here sample by sample in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from compress.losses.dkd import DKD, dkd_terms
from compress.losses.kd import KD, kd_loss


def logits(batch, classes, seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(batch, classes, generator=generator, dtype=torch.float64)


def dkd_loss(student, teacher, target, alpha, beta, temperature):
    target_term, others_term = dkd_terms(student, teacher, target, temperature)
    return alpha * target_term + beta * others_term


def softmax(values, temperature):
    exponentials = [math.exp(value / temperature) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def divergence(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def slow_terms(student, teacher, target, temperature):
    """KD, TCKD, NCKD and the teacher's 1 - p_y, per sample, without the factor T^2."""
    rows = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True):
        p_s, p_t = softmax(s, temperature), softmax(t, temperature)
        others_s = softmax([value for index, value in enumerate(s) if index != y], temperature)
        others_t = softmax([value for index, value in enumerate(t) if index != y], temperature)
        binary_s, binary_t = [p_s[y], 1 - p_s[y]], [p_t[y], 1 - p_t[y]]
        rows.append((divergence(p_t, p_s), divergence(binary_t, binary_s), divergence(others_t, others_s), 1 - p_t[y]))
    return torch.tensor(rows, dtype=torch.float64).T


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_kd_and_dkd_equal_their_formulas(classes, temperature):
    student, teacher = logits(16, classes, 0), logits(16, classes, 1)
    target = torch.arange(16) % classes
    kd, target_term, others_term, _ = slow_terms(student, teacher, target, temperature)
    square = temperature**2
    torch.testing.assert_close(kd_loss(student, teacher, temperature), square * kd.mean(), rtol=1e-12, atol=1e-12)
    expected = square * (1.5 * target_term + 7 * others_term).mean()
    actual = dkd_loss(student, teacher, target, 1.5, 7.0, temperature)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_kd_is_tckd_plus_the_teachers_doubt_times_nckd():
    for index in range(20):
        student, teacher, target = logits(1, 10, index), logits(1, 10, 100 + index), torch.tensor([index % 10])
        target_term, others_term = dkd_terms(student, teacher, target, 4.0)
        doubt = 1 - F.softmax(teacher / 4, dim=1)[0, target[0]]
        assert kd_loss(student, teacher, 4.0).item() == pytest.approx(
            (target_term + doubt * others_term).item(), rel=1e-12
        )


def test_gradients_equal_finite_differences():
    student = logits(4, 5, 2).requires_grad_()
    teacher, target = logits(4, 5, 3), torch.tensor([0, 4, 2, 2])
    assert torch.autograd.gradcheck(lambda s: kd_loss(s, teacher, 4.0), student)
    assert torch.autograd.gradcheck(lambda s: dkd_loss(s, teacher, target, 1.0, 8.0, 4.0), student)


def test_two_classes_leave_nothing_to_nckd():
    target_term, others_term = dkd_terms(logits(8, 2, 4), logits(8, 2, 5), torch.tensor([0, 1] * 4), 4.0)
    assert others_term.item() == 0
    assert target_term.item() > 0


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits_give_finite_losses_and_gradients(size):
    student = torch.tensor([[size, -size, 0.0], [0.0, size, size]], requires_grad=True)
    teacher = torch.tensor([[-size, size, 0.0], [size, 0.0, -size]])
    target = torch.tensor([0, 2])
    loss = kd_loss(student, teacher, 4.0) + dkd_loss(student, teacher, target, 1.0, 8.0, 4.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_autocast_and_half_precision_logits_are_computed_in_float32():
    student, teacher = logits(16, 10, 6).bfloat16(), logits(16, 10, 7).bfloat16()
    target = torch.arange(16) % 10
    exact_kd = kd_loss(student.double(), teacher.double(), 4.0)
    exact_dkd = dkd_loss(student.double(), teacher.double(), target, 1.0, 8.0, 4.0)
    with torch.autocast("cpu", torch.bfloat16):
        kd, dkd = kd_loss(student, teacher, 4.0), dkd_loss(student, teacher, target, 1.0, 8.0, 4.0)
    assert kd.dtype == dkd.dtype == torch.float32
    torch.testing.assert_close(kd.double(), exact_kd, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dkd.double(), exact_dkd, rtol=1e-5, atol=1e-6)


def test_the_callables_weight_their_terms():
    student, teacher, target = logits(8, 10, 8), logits(8, 10, 9), torch.arange(8)
    cross_entropy = F.cross_entropy(student, target)
    terms = KD(temperature=2.0, alpha=0.7)(student, target, teacher)
    torch.testing.assert_close(terms["cross_entropy"], 0.3 * cross_entropy)
    torch.testing.assert_close(terms["kd"], 0.7 * kd_loss(student, teacher, 2.0))

    loss = DKD(alpha=2.0, beta=3.0, temperature=2.0, warmup_epochs=4)
    target_term, others_term = dkd_terms(student, teacher, target, 2.0)
    for epoch, ramp in [(0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)]:
        terms = loss(student, target, teacher, epoch)
        torch.testing.assert_close(terms["cross_entropy"], cross_entropy)
        torch.testing.assert_close(terms["tckd"], ramp * 2 * target_term)
        torch.testing.assert_close(terms["nckd"], ramp * 3 * others_term)
