"""Runs against each other: mean and deviation over seeds, and the Pareto front of accuracy and bytes."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from compress.report.finished import Run
from compress.results.tradeoff import Row

# Overrides that a report shows elsewhere or that say nothing about the result.
SHOWN_ELSEWHERE = {"method", "student", "seed", "data", "data.root", "data.limit"}
SHOWN_ELSEWHERE |= {"output_directory", "trainer.log_every"}


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation of some values; the deviation of one is None."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Statistic":
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __format__(self, form: str) -> str:
        """The mean in that form, or with two decimals, and the deviation with two, if there is one."""
        return f"{self.mean:{form or '.2f'}}" + ("" if self.deviation is None else f" ± {self.deviation:.2f}")

    def __str__(self) -> str:
        return f"{self}"


@dataclass(frozen=True)
class Variant:
    """One variant over the seeds, with a row for each; `row` is the first, for what the seeds share."""

    rows: tuple[Row, ...]

    @property
    def row(self) -> Row:
        return self.rows[0]

    @property
    def bytes(self) -> float:
        """The mean size of the files."""
        return statistics.mean(row.bytes for row in self.rows)

    @property
    def test_accuracy(self) -> float:
        """The mean accuracy on the test images, 0..1. Raises UserError where any had no labels."""
        return statistics.mean(row.accuracy_on("test") for row in self.rows)

    def statistic(self, column: str) -> Statistic | None:
        """Of a column of numbers, in the unit of the files; None where any value is unknown."""
        return statistic([getattr(row, column) for row in self.rows])

    def mean(self, column: str) -> float | None:
        known = self.statistic(column)
        return None if known is None else known.mean

    def deviation(self, column: str) -> float | None:
        known = self.statistic(column)
        return None if known is None else known.deviation


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

    def reference(self, variant: Variant) -> Callable[[str], float | None] | None:
        """The means of the float32 student, for a `variant` other than that."""
        student = next((other for other in self.variants if other.row.quantizer == "none"), variant)
        return None if student is variant else student.mean


def statistic(values: Sequence[float | None]) -> Statistic | None:
    """Mean and deviation; None where any value is unknown."""
    known = [value for value in values if value is not None]
    if not values or len(known) < len(values):
        return None
    return Statistic.of(known)


def groups(runs: Sequence[Run]) -> tuple[Group, ...]:
    """The groups of `runs`, in the order of their first runs; runs on different data are never in one."""
    by_settings: dict[Any, list[Run]] = defaultdict(list)
    for run in runs:
        by_settings[run.data, run.student, _frozen(run.settings)].append(run)
    result = []
    for members, settings in zip(by_settings.values(), _settings(list(by_settings.values())), strict=True):
        latest = {run.seed: run for run in sorted(members, key=lambda run: run.record.started)}
        chosen = tuple(latest[seed] for seed in sorted(latest))
        repeated = tuple(run for run in members if run not in chosen)
        result.append(Group(chosen, repeated, settings, variants(chosen)))
    return tuple(result)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (bytes, accuracy) that no other equals or beats in both and beats in one, smallest first.

    Of equal points the first counts.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def variants(runs: Sequence[Run]) -> tuple[Variant, ...]:
    """The variants that any of the runs has, in the order of the rows."""
    rows: dict[Any, list[Row]] = defaultdict(list)
    for run in runs:
        for row in run.rows:
            # The rate of a budget differs a little from seed to seed.
            width = "coded" if row.coded else row.bits
            rows[row.file, row.quantizer, width, row.activation_bits, row.runtime].append(row)
    return tuple(Variant(tuple(members)) for members in rows.values())


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted((key, _frozen(content)) for key, content in value.items()))
    return tuple(map(_frozen, value)) if isinstance(value, list) else (type(value).__name__, value)


def _settings(groups: Sequence[Sequence[Run]]) -> list[str]:
    """What was typed for each group of runs and not for all on the same data.

    Where that does not tell two of them apart, the keys of the configuration in which they differ.
    """
    first = [runs[0] for runs in groups]
    shared: dict[str, set[str]] = {}
    for run in first:
        shared[run.data] = set(_typed(run)) & shared.get(run.data, set(_typed(run)))
    texts = [" ".join(text for text in _typed(run) if text not in shared[run.data]) for run in first]
    alike = defaultdict(list)
    for index, (run, text) in enumerate(zip(first, texts, strict=True)):
        alike[run.data, run.method, run.student, text].append(index)
    for indices in alike.values():
        for index, differences in zip(indices, _differences([first[index] for index in indices]), strict=True):
            texts[index] = " ".join([texts[index], *differences]).strip()
    return texts


def _typed(run: Run) -> list[str]:
    """The overrides that say something about the result and have no column in a report."""
    overrides = [text for text in run.record.overrides if not text.startswith(("hydra", "logger"))]
    return [text for text in overrides if text.lstrip("+").partition("=")[0] not in SHOWN_ELSEWHERE]


def _differences(runs: Sequence[Run]) -> list[list[str]]:
    """For each run, the settings in which the runs differ, as `key=value`."""
    values = [{key: str(value) for key, value in run.settings.items()} for run in runs]
    keys = sorted(set().union(*values))
    differing = [key for key in keys if len({settings.get(key) for settings in values}) > 1]
    return [[f"{key}={settings[key]}" for key in differing if key in settings] for settings in values]
