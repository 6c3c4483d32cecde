"""Runs against each other: mean and deviation over seeds, and the Pareto front of accuracy and bytes."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from compress.report.finished import Run
from compress.results.tradeoff import Row

# Overrides that a report shows elsewhere or that say nothing about the result.
SHOWN_ELSEWHERE = (
    "method",
    "student",
    "seed",
    "data",
    "output_directory",
    "data.root",
    "data.limit",
    "trainer.log_every",
)


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation of `count` values; the deviation of one is None."""

    mean: float
    deviation: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.deviation is None else f" ± {self.deviation:.2f}")


@dataclass(frozen=True)
class Variant:
    """One variant over the seeds: accuracies and agreement in percent, size in bytes, latency in milliseconds.

    `row` is that of the first seed, for what the seeds share.
    """

    row: Row
    test: Statistic
    validation: Statistic | None
    agreement: Statistic | None
    latency: Statistic | None
    bytes: float
    ratio: float | None


@dataclass(frozen=True)
class Group:
    """Runs that are equal in all but the seed, one for each, in order of the seeds.

    `settings` is what was typed for them and not for all runs on the same data, beyond what has a column of its own.
    Where a seed ran several times under the same configuration the latest counts; `repeated` are the others.
    """

    runs: tuple[Run, ...]
    repeated: tuple[Run, ...]
    settings: str
    variants: tuple[Variant, ...]


def statistic(values: Iterable[float | None]) -> Statistic | None:
    """None where any value is unknown."""
    values = list(values)
    if not values or None in values:
        return None
    return Statistic(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def groups(runs: Sequence[Run]) -> tuple[Group, ...]:
    """The groups of `runs`, in the order of their first runs; runs on different data are never in one."""
    by_settings: dict[Any, list[Run]] = defaultdict(list)
    for run in runs:
        by_settings[run.data, run.student, _frozen(run.settings)].append(run)
    found = []
    for members, settings in zip(by_settings.values(), _settings(list(by_settings.values())), strict=True):
        latest = {run.seed: run for run in sorted(members, key=lambda run: run.started)}
        chosen = tuple(latest[seed] for seed in sorted(latest))
        repeated = tuple(run for run in members if run not in chosen)
        found.append(Group(chosen, repeated, settings, _variants(chosen)))
    return tuple(found)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (bytes, accuracy) that no other equals or beats in both and beats in one, smallest first.

    Of equal points the first counts.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def _variants(runs: Sequence[Run]) -> tuple[Variant, ...]:
    """The variants that any of the runs has, in the order of the rows."""
    rows: dict[Any, list[Row]] = defaultdict(list)
    for run in runs:
        for row in run.rows:
            # The mean width of mixed precision differs a little from seed to seed.
            width = row.bits if row.levels is not None or row.bits == 32 else "mixed"
            rows[row.file, row.quantizer, width, row.activation_bits, row.runtime].append(row)
    return tuple(
        Variant(
            row=own[0],
            test=statistic(100 * row.test_accuracy for row in own),
            validation=statistic(_percent(row.validation_accuracy) for row in own),
            agreement=statistic(_percent(row.agreement) for row in own),
            latency=statistic(row.latency_ms for row in own),
            bytes=statistics.mean(row.bytes for row in own),
            ratio=None if any(row.ratio is None for row in own) else statistics.mean(row.ratio for row in own),
        )
        for own in rows.values()
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted((key, _frozen(each)) for key, each in value.items()))
    return tuple(map(_frozen, value)) if isinstance(value, list) else (type(value).__name__, value)


def _settings(members: Sequence[Sequence[Run]]) -> list[str]:
    """What was typed for each group and not for all on the same data.

    Where that does not tell two of them apart, the keys of the configuration in which they differ.
    """
    typed = [[each for each in own[0].overrides if not each.startswith(("hydra", "logger"))] for own in members]
    typed = [[each for each in own if each.lstrip("+").partition("=")[0] not in SHOWN_ELSEWHERE] for own in typed]
    everywhere: dict[str, set[str]] = {}
    for own, overrides in zip(members, typed, strict=True):
        everywhere[own[0].data] = everywhere.get(own[0].data, set(overrides)) & set(overrides)
    texts = [
        " ".join(each for each in overrides if each not in everywhere[own[0].data])
        for own, overrides in zip(members, typed, strict=True)
    ]
    shown = [(own[0].data, own[0].method, own[0].student, text) for own, text in zip(members, texts, strict=True)]
    for same, count in Counter(shown).items():
        if count > 1:
            alike = [index for index, each in enumerate(shown) if each == same]
            values = [{key: str(value) for key, value in members[index][0].settings.items()} for index in alike]
            keys = sorted(set().union(*values))
            differing = [key for key in keys if len({each.get(key) for each in values}) > 1]
            for index, own in zip(alike, values, strict=True):
                differences = [f"{key}={own[key]}" for key in differing if key in own]
                texts[index] = " ".join([texts[index], *differences]).strip()
    return texts
