"""Coded bits in the loss: what they are, where their gradients lead, and a training that ends with a rate."""

import math

import pytest
import torch

from compress.errors import UserError
from compress.quantization.coded_steps import LARGEST, CodedStep, RateTraining, coded_bits
from compress.quantization.rate_distortion import entropy


def weights(seed=0, count=(64, 32), deviation=0.1):
    return deviation * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_values_are_whole_steps_and_codes_give_them_again():
    weight = weights()
    step = CodedStep(weight)
    values = step(weight)
    steps = values / step.log_step.exp()
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert ((values - weight).abs() <= step.log_step.exp() / 2 * (1 + 1e-5)).all()
    codes, grid, bits = step.codes(weight, "layer")
    torch.testing.assert_close(grid.dequantize(codes), values.detach(), rtol=0, atol=0)
    assert grid.levels % 2 == 1
    assert (grid.zero_point == grid.levels // 2).all()
    assert bits == pytest.approx(entropy([steps.detach().round()]) / weight.numel())


def test_bits_are_the_entropy_and_draw_weights_to_frequent_codes():
    weight = weights().requires_grad_()
    step = CodedStep(weight)
    interpolated, exact, slope = step.bits(weight)
    length = step.log_step.detach().exp()
    assert float(exact) == pytest.approx(entropy([(weight.detach() / length).round()]), rel=1e-5)
    assert float(interpolated.detach()) == pytest.approx(float(exact), rel=0.1)
    interpolated.backward()
    # Zero is the most frequent code: a shorter weight and a longer step take fewer bits.
    inner = weight.detach().abs() < 2 * length
    assert (weight.grad[inner] * weight.detach().sign()[inner] > 0).all()
    assert float(slope) == pytest.approx(-float((weight.grad * weight.detach()).sum()), rel=1e-4)
    assert float(slope) < 0
    assert step.log_step.grad is None
    moved = (weight.detach() * 0.99).requires_grad_()
    assert step.bits(moved)[0] < interpolated


def test_what_is_far_out_has_the_outermost_code_and_all_zeros_take_no_bits():
    weight = weights()
    step = CodedStep(weight)
    weight[0, 0] = 1e6
    codes, grid, _ = step.codes(weight, "layer")
    assert int(codes[0, 0]) - int(grid.zero_point[0]) == LARGEST
    assert all(torch.isfinite(bits) for bits in step.bits(weight))
    zeros = torch.zeros(8, 4)
    interpolated, exact, _ = CodedStep(zeros).bits(zeros)
    assert float(exact) == 0
    assert float(interpolated.detach()) < 2
    assert CodedStep(zeros).codes(zeros, "layer")[2] == 0


def test_a_layer_that_has_diverged_is_named():
    weight = weights()
    step = CodedStep(weight)
    weight[0, 0] = math.nan
    with pytest.raises(UserError, match=r"layer1\.conv: found weights or steps that are not finite"):
        step.codes(weight, "layer1.conv")


def task(seed=0):
    """Inputs, the outputs of a sparse matrix (4, 64) for them, and weights near that matrix."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(4, 64, generator=generator)
    matrix[:, 8:] = 0
    inputs = torch.randn(512, 64, generator=generator)
    return inputs, inputs @ matrix.T, matrix + 0.2 * torch.randn(4, 64, generator=generator)


def train(training, optimizer_class, learning_rate, batches=600):
    """The bits after each step of a training with `training`, the layer's step and weight, and the loss at its end."""
    inputs, expected, start = task()
    weight = torch.nn.Parameter(start)
    step = CodedStep(weight)
    optimizer = optimizer_class([weight, *step.parameters()], lr=learning_rate)
    rates = []
    for _ in range(batches):
        bits = coded_bits([(step, weight)])
        loss = (inputs @ step(weight).T - expected).square().mean()
        optimizer.zero_grad()
        (loss + training.price * bits.interpolated).backward()
        training.before_step(bits)
        optimizer.step()
        training.after_step(bits, batches)
        rates.append(float(bits.exact))
    return rates, step(weight).detach(), float(loss.detach())


@pytest.mark.parametrize("rate", [1.0, 2.0])
@pytest.mark.parametrize(("optimizer", "learning_rate"), [(torch.optim.Adam, 0.01), (torch.optim.SGD, 0.02)])
def test_a_training_ends_with_its_rate(rate, optimizer, learning_rate):
    rates, values, loss = train(RateTraining(rate), optimizer, learning_rate)
    assert rates[0] > 2.2
    assert rates[-1] == pytest.approx(rate, rel=0.15)
    if rate == 1.0:
        # What is left are the weights that the task needs.
        assert (values[:, 8:] == 0).float().mean() > 0.9
        assert loss < 0.1 * float(task()[1].square().mean())


def test_the_price_is_the_loss_of_stretching_all_steps_over_the_bits_that_it_saves():
    """Both by finite differences of functions that the gradients belong to, for a loss that is linear in the values."""
    weight = weights()
    step, direction = CodedStep(weight), weights(1)
    training = RateTraining(1.0)
    bits = coded_bits([(step, weight)])
    (step(weight) * direction).sum().backward()
    of_loss = float(step.log_step.grad)
    training.before_step(bits)
    of_rate = -float(bits.slopes.sum())
    assert float(training.price) == pytest.approx(max(of_loss / of_rate, 0), rel=1e-4)
    added = float(step.log_step.grad) - of_loss
    assert added == pytest.approx(-float(training.price) * of_rate, rel=1e-4, abs=1e-6)


def test_gradients_that_are_not_finite_leave_the_price_as_it_is():
    weight = weights()
    step, training = CodedStep(weight), RateTraining(1.0)
    for factor in (1.0, math.inf):
        bits = coded_bits([(step, weight)])
        step.zero_grad()
        (step(weight).square().sum() * factor).backward()
        before = training.price.clone()
        training.before_step(bits)
    assert torch.equal(training.price, before)
    assert torch.isfinite(training.of_loss)


def test_a_price_that_was_saved_goes_on():
    weight = weights()
    trainings = [RateTraining(1.0), RateTraining(1.0)]
    for index, seed in enumerate((1, 2, 3)):
        if index == 2:
            trainings[1].load_state_dict(trainings[0].state_dict())
        for training in trainings[: 1 if index < 2 else 2]:
            step = CodedStep(weight)
            bits = coded_bits([(step, weight)])
            (step(weight) - weights(seed)).square().sum().backward()
            training.before_step(bits)
            training.after_step(bits, 20)
    assert all(torch.equal(one, other) for one, other in zip(*[each.buffers() for each in trainings], strict=True))
