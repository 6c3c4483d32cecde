"""Mutual learning and logit standardisation against their formulas in float64."""

import pytest
import torch
from torch.nn import functional as F

from compress.losses import dkd, kd
from compress.losses.dml import DML
from compress.losses.kd import standardise
from compress.pipeline.check import checked_jobs


def logits(seed, batch=8, classes=10, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(batch, classes, generator=generator, dtype=torch.float64)


def dml_loss(logits, peer_logits, target, temperature):
    return sum(DML(temperature=temperature)(logits, target, peer_logits).values())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("peers", [1, 2])
def test_dml_equals_its_formula(peers, temperature):
    own, target = logits(0), torch.arange(8)
    others = [logits(1 + index) for index in range(peers)]
    expected = F.nll_loss(own.log_softmax(1), target)
    p_own = (own / temperature).softmax(1)
    for other in others:
        p_other = (other / temperature).softmax(1)
        expected = expected + temperature**2 * (p_other * (p_other.log() - p_own.log())).sum() / 8 / peers
    torch.testing.assert_close(dml_loss(own, others, target, temperature), expected, rtol=1e-12, atol=1e-12)


def test_no_gradient_reaches_a_peer():
    own, other = logits(0).requires_grad_(), logits(1).requires_grad_()
    dml_loss(own, [other], torch.arange(8), 1.0).backward()
    assert own.grad.abs().sum() > 0
    assert other.grad is None


def test_dml_gradients_equal_finite_differences_and_a_lone_peer_is_refused():
    others, target = [logits(1), logits(2)], torch.arange(8)
    assert torch.autograd.gradcheck(lambda own: dml_loss(own, others, target, 2.0), logits(0).requires_grad_())
    with pytest.raises(ValueError, match="at least one other peer"):
        dml_loss(logits(0), [], target, 1.0)


def test_standardisation_equals_its_formula_and_ignores_shift_and_scale():
    z = logits(0)
    mean = z.sum(1, keepdim=True) / 10
    deviation = (((z - mean) ** 2).sum(1, keepdim=True) / 9).sqrt()
    torch.testing.assert_close(standardise(z), (z - mean) / (1e-7 + deviation), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(standardise(5 * z + 3), standardise(z), rtol=1e-6, atol=1e-6)
    assert torch.isfinite(standardise(torch.ones(2, 10))).all()
    assert torch.autograd.gradcheck(standardise, logits(3, batch=2).requires_grad_())


def test_standardised_losses_compare_standardised_logits():
    own, teacher, target = logits(0), logits(1), torch.arange(8)
    terms = kd.KD(temperature=2.0, alpha=0.9, kd_weight=10.0, standardise=True)(own, target, teacher)
    torch.testing.assert_close(terms["cross_entropy"], 0.1 * F.cross_entropy(own, target))
    torch.testing.assert_close(terms["kd"], 9 * kd.kd_loss(standardise(own), standardise(teacher), 2.0))
    terms = dkd.DKD(temperature=2.0, alpha=9.0, beta=72.0, warmup_epochs=1, standardise=True)(own, target, teacher)
    target_term, others_term = dkd.dkd_terms(standardise(own), standardise(teacher), target, 2.0)
    torch.testing.assert_close(terms["tckd"], 9 * target_term)
    torch.testing.assert_close(terms["nckd"], 72 * others_term)


def test_standardise_brings_the_weights_of_its_paper():
    small = ["teacher=resnet8", "student=resnet8", "quantizer=none"]
    composed = checked_jobs(["method=kd", *small, "loss.standardise=true"])[0].config
    assert (composed.loss.temperature, composed.loss.alpha, composed.loss.kd_weight) == (2.0, 0.9, 10.0)
    composed = checked_jobs(["method=dkd", *small, "loss.standardise=true"])[0].config
    assert (composed.loss.temperature, composed.loss.alpha, composed.loss.beta) == (2.0, 9.0, 72.0)
    composed = checked_jobs(["method=dkd", *small])[0].config
    assert (composed.loss.temperature, composed.loss.alpha, composed.loss.beta) == (4.0, 1.0, 8.0)
