"""How many bytes a network takes at a given loss of test accuracy: in fixed widths, at rates, and through NNCodec.

A setting that was measured for every seed is a point: the means over the seeds of the bytes of its file and of its
changes of accuracy. Of each kind those points count that no other beats in both bytes and validation accuracy, so that
nothing is chosen on the test set.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from compress.report.comparison import pareto_front
from compress.results.markdown import markdown_table

DROPS = (0.1, 0.3, 0.5, 1.0)
WIDTHS, RATES, CODEC = "fixed widths", "rates", "nncodec"


@dataclass(frozen=True)
class Point:
    """`bytes` of a file, its `validation` accuracy and the `drop` of its test accuracy, in points against float32."""

    bytes: float
    validation: float
    drop: float


def drop_table(stem: str, seeds: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """A Markdown table of kilobytes with a line for each of `DROPS`; `seeds` as in `quantizer_study.tables`.

    Where the package was there, the share of bytes saved against NNCodec at the same drop stands beside them. A kind
    that does not reach a drop has its nearest point instead.
    """
    kinds = {kind: front(points) for kind, points in _points(seeds).items()}
    ours = [kind for kind in kinds if kind != CODEC and CODEC in kinds]
    lines = []
    for drop in DROPS:
        reached = {kind: bytes_at(points, drop) for kind, points in kinds.items()}
        sizes = [_kilobytes(reached[kind], points, drop) for kind, points in kinds.items()]
        lines.append([f"{drop}", *sizes, *(_saved(reached[kind], reached[CODEC]) for kind in ours)])
    head = ["drop, points", *(f"{kind}, kB" for kind in kinds), *(f"{kind}: saved against {CODEC}" for kind in ours)]
    title = f"{stem}, size at a drop of test accuracy, means of {len(seeds)} seeds"
    return f"{title}\n\n{markdown_table(head, lines)}\n"


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other equals or beats in bytes and in validation accuracy and beats in one, smallest first."""
    return [points[index] for index in pareto_front([(point.bytes, point.validation) for point in points])]


def bytes_at(points: Sequence[Point], drop: float) -> float | None:
    """The fewest bytes at which no more than `drop` points are lost; `points` are those of a `front`.

    Between two neighbours in size the logarithm of the bytes is linear in the drop. Where noise lets the drop be met
    several times, the smallest size counts. None where the smallest file loses less, or every file more: nothing is
    extrapolated.
    """
    if points[0].drop == drop:
        return points[0].bytes
    if points[0].drop < drop:
        return None
    for smaller, larger in pairwise(points):
        if larger.drop <= drop:
            share = (smaller.drop - drop) / (smaller.drop - larger.drop)
            return math.exp((1 - share) * math.log(smaller.bytes) + share * math.log(larger.bytes))
    return None


def _points(seeds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, list[Point]]:
    """The points of each kind; what was not measured for every seed is none."""
    kinds: dict[str, list[Point]] = {}
    for name in [name for name in seeds[0] if all(name in measured for measured in seeds)]:
        for index, row in enumerate(seeds[0][name]["rows"]):
            kind = CODEC if row["quantizer"] == CODEC else RATES if row["levels"] is None else WIDTHS
            kind = name if name.startswith(RATES) else kind
            rows = [(measured[name]["rows"][index], measured[name]["float"]) for measured in seeds]
            validation, test = (
                statistics.mean(100 * (row[column] - reference[column]) for row, reference in rows)
                for column in ("validation_accuracy", "test_accuracy")
            )
            size = statistics.mean(row["bytes"] for row, _ in rows)
            kinds.setdefault(kind, []).append(Point(size, validation, drop=-test))
    return {kind: kinds[kind] for kind in sorted(kinds, key=lambda kind: (kind == CODEC, kind != WIDTHS, kind))}


def _kilobytes(size: float | None, points: Sequence[Point], drop: float) -> str:
    if size is not None:
        return f"{size / 1000:,.1f}"
    nearest = points[0] if points[0].drop < drop else min(points, key=lambda point: point.drop)
    return f"not reached: {nearest.drop:.2f} at {nearest.bytes / 1000:,.1f}"


def _saved(size: float | None, reference: float | None) -> str:
    return "" if size is None or reference is None else f"{100 * (1 - size / reference):.0f} %"
