"""Learning rates step by step, against the definitions and against PyTorch's own schedulers."""

import math

import pytest
import torch

from compress.optim.schedules import Cosine, Exponential, Linear, Multistep, OneCycle, Schedule


def rates(schedule, steps_per_epoch=5, epochs=6):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule(optimizer, steps_per_epoch, epochs)
    seen = []
    for _ in range(steps_per_epoch * epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def torch_rates(build, steps=30, stride=1):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler = build(optimizer)
    seen = []
    for step in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % stride == 0:
            scheduler.step()
    return seen


def test_schedules_equal_pytorchs():
    scheduler = torch.optim.lr_scheduler
    assert rates(Schedule()) == [1.0] * 30
    assert rates(Cosine()) == pytest.approx(torch_rates(lambda o: scheduler.CosineAnnealingLR(o, 30)))
    assert rates(Linear(minimum=0.1)) == pytest.approx(torch_rates(lambda o: scheduler.LinearLR(o, 1.0, 0.1, 30)))
    expected = torch_rates(lambda o: scheduler.MultiStepLR(o, [2, 4], 0.1), stride=5)
    assert rates(Multistep(milestones=[2, 4])) == pytest.approx(expected)
    expected = torch_rates(lambda o: scheduler.ExponentialLR(o, 0.8), stride=5)
    assert rates(Exponential(gamma=0.8)) == pytest.approx(expected)


def test_milestones_fall_on_epochs_for_any_number_of_steps():
    for steps_per_epoch in (1, 3, 7, 391, 782):
        seen = rates(Multistep(milestones=[3], warmup_epochs=1), steps_per_epoch, 5)
        first = next(step for step, rate in enumerate(seen) if rate < 0.5 and step > steps_per_epoch)
        assert first == 3 * steps_per_epoch


def test_onecycle_rises_to_the_peak_and_ends_low():
    seen = rates(OneCycle(rise=0.3), steps_per_epoch=10, epochs=10)
    assert seen[0] == pytest.approx(1 / 25)
    assert max(seen) == seen[30] == pytest.approx(1.0)
    assert seen[-1] < 1e-3
    assert seen[15] == pytest.approx(1 + (1 / 25 - 1) * (1 + math.cos(math.pi * 0.5)) / 2)


def test_warm_up_climbs_linearly_before_any_schedule():
    for schedule in (Schedule, Cosine, Linear, Exponential, OneCycle):
        seen = rates(schedule(warmup_epochs=2))
        assert seen[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])


def test_a_restored_scheduler_goes_on_at_the_same_rate():
    parameter = torch.nn.Parameter(torch.zeros(1))
    schedule = Cosine(warmup_epochs=1)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = schedule(optimizer, 5, 6)
    for _ in range(12):
        optimizer.step()
        scheduler.step()
    state = scheduler.state_dict(), optimizer.state_dict()
    second = torch.optim.SGD([parameter], lr=1.0)
    restored = schedule(second, 5, 6)
    restored.load_state_dict(state[0])
    second.load_state_dict(state[1])
    assert second.param_groups[0]["lr"] == rates(schedule)[12]
