"""Mean and deviation over seeds, which runs belong together, and the Pareto front, against independent computations."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compress.report.comparison import groups, pareto_front, statistic
from compress.report.finished import Run
from compress.results.record import Record
from compress.results.tradeoff import Row

ROW = Row(
    quantizer="none",
    bits=32,
    levels=None,
    first_last_bits=None,
    activation_bits=32,
    runtime="torch",
    sparsity=0.0,
    validation_accuracy=0.8,
    test_accuracy=0.9,
    agreement=1.0,
    runtime_agreement=None,
    logit_difference=None,
    bytes=1000,
    ratio=1.0,
    latency_ms=0.5,
    latency_32_ms=9.0,
    file="models/student-fp32.safetensors",
)


def run(name, seed=0, accuracy=0.9, size=1000, overrides=(), settings=None, started="", data="Digits"):
    record = Record(
        overrides=[f"seed={seed}", *overrides],
        started=started,
        seed=seed,
        data={"name": data},
        student={"model": "resnet8"},
        rows=[replace(ROW, test_accuracy=accuracy, bytes=size)],
    )
    settings = settings or {"optimizer.lr": 0.1, "data.mean": [0.1, 0.2]}
    return Run(Path(name), name, record, method="kd", data=data, experiment="", settings=settings, curves={})


@pytest.mark.parametrize("count", [2, 3, 10])
def test_mean_and_sample_deviation_are_those_of_numpy(count):
    values = np.random.default_rng(count).uniform(0, 100, count)
    measured = statistic(values.tolist())
    assert measured.mean == pytest.approx(values.mean(), rel=1e-12)
    assert measured.deviation == pytest.approx(values.std(ddof=1), rel=1e-12)


def test_one_value_has_no_deviation_and_an_unknown_one_no_mean():
    assert str(statistic([91.234])) == "91.23"
    assert statistic([1.0, None]) is None


@pytest.mark.parametrize("seed", range(5))
def test_the_front_holds_exactly_the_points_that_no_other_beats(seed):
    draw = np.random.default_rng(seed)
    points = [(float(x), float(y)) for x, y in zip(draw.integers(0, 12, 40), draw.integers(0, 12, 40), strict=True)]

    def beaten(point):
        return any(other != point and other[0] <= point[0] and other[1] >= point[1] for other in points)

    front = [points[index] for index in pareto_front(points)]
    assert front == sorted({point for point in points if not beaten(point)})


def test_runs_that_differ_in_the_seed_alone_are_one_group_with_their_mean():
    runs = [run("a", 0, 0.90, 1000), run("b", 2, 0.96, 1030), run("c", 1, 0.93, 1000)]
    [group] = groups(runs)
    assert [run.name for run in group.runs] == ["a", "c", "b"]
    [variant] = group.variants
    accuracy = variant.statistic("test_accuracy")
    assert (accuracy.mean, accuracy.deviation) == (pytest.approx(0.93), pytest.approx(0.03))
    assert variant.mean("bytes") == pytest.approx(1010)


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": {"optimizer.lr": 0.2, "data.mean": [0.1, 0.2]}},
        {"settings": {"optimizer.lr": 0.1, "data.mean": [0.1, 0.3]}},
        {"settings": {"optimizer.lr": 0.1, "data.mean": [0.1, 0.2], "method.checkpoint": "x"}},
        {"data": "FashionMNIST"},
    ],
)
def test_runs_that_differ_in_anything_else_are_two(changes):
    assert len(groups([run("a", 0), run("b", 1, **changes)])) == 2


def test_true_and_one_are_different_settings():
    assert len(groups([run("a", 0, settings={"x": True}), run("b", 1, settings={"x": 1})])) == 2


def test_of_a_repeated_seed_the_latest_counts():
    old = run("old", 0, 0.5, started="2026-01-01T00:00:00+00:00")
    new = run("new", 0, 0.7, started="2026-01-02T00:00:00+00:00")
    [group] = groups([new, old, run("other", 1, 0.9)])
    assert group.repeated == (old,)
    assert group.variants[0].statistic("test_accuracy").deviation == pytest.approx(0.02**0.5)
    assert group.variants[0].mean("test_accuracy") == pytest.approx(0.8)


def test_a_group_is_named_by_what_was_typed_for_it_and_not_for_all():
    typed = ("experiment=x", "trainer.max_epochs=5")
    first = run("a", overrides=(*typed, "optimizer.lr=0.2"), settings={"optimizer.lr": 0.2})
    second = run("b", overrides=(*typed, "data.root=/elsewhere", "logger=none"))
    assert [group.settings for group in groups([first, second])] == ["optimizer.lr=0.2", ""]


def test_groups_that_were_typed_alike_are_told_apart_by_their_configuration():
    first = run("a", settings={"optimizer.lr": 0.1, "loss.alpha": 0.9})
    second = run("b", settings={"optimizer.lr": 0.1, "loss.alpha": 0.5, "loss.beta": 2})
    assert [group.settings for group in groups([first, second])] == ["loss.alpha=0.9", "loss.alpha=0.5 loss.beta=2"]
