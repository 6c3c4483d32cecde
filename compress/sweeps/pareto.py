"""What a search found: the Pareto set of validation accuracy and what it minimizes, as `pareto.csv` and `pareto.png`.

| column | meaning |
|---|---|
| trial | number of the trial, which is also its directory in `trials/` |
| variant | the row of the run's trade-off, such as `gpfq 3 bit` |
| validation_accuracy | 0..1, what was searched by |
| test_accuracy | 0..1, which nothing was chosen by |
| latency_ms | median of an image, on one thread, where that was minimized |
| bytes, file | of the written model, relative to the folder of the CSV |
| overrides | what `scripts/run.py` takes to repeat the run |
"""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from compress.export.formats import REFERENCE
from compress.files import write_atomically, write_csv
from compress.report.comparison import pareto_front
from compress.results.record import FILE, Record
from compress.results.tradeoff import Row
from compress.results.tradeoff_picture import name_axes

# Of a label in the picture, in points.
LINE, WIDTH = 9, 75


@dataclass(frozen=True)
class Cost:
    """What a search minimizes: a `column` of the rows that it is about, told as its `share` in a `unit`."""

    column: str
    name: str
    share: float
    unit: str
    is_about: Callable[[Row], bool] = lambda row: True

    def of(self, row: Row) -> float:
        """The value of the column."""
        value: float = getattr(row, self.column)
        return value

    def in_units(self, row: Row) -> float:
        """So many `unit`s."""
        return self.share * self.of(row)


# By the word of the search file. Torch computes all variants in float, which says nothing of their latency.
COSTS = {
    "bytes": Cost("bytes", "size of the file", 1e-3, "kB"),
    "latency": Cost("latency_ms", "latency", 1, "ms", lambda row: row.runtime != REFERENCE.runtime),
}


@dataclass(frozen=True)
class Point:
    """One variant of one trial; `directory` is the trial's, `overrides` all of its run's."""

    trial: int
    directory: Path
    overrides: tuple[str, ...]
    row: Row


def chosen(rows: Sequence[Row], cost: Cost) -> Row:
    """The row that stands for a run: the best validation accuracy among the quantized ones, the cheapest of equals."""
    about = [row for row in rows if cost.is_about(row)]
    variants = [row for row in about if row.quantizer != "none"] or about
    return max(variants, key=lambda row: (row.accuracy_on("validation"), -cost.of(row)))


def read_points(directories: Mapping[int, Path]) -> list[Point]:
    """Every variant of the finished trials, given as directory by number. Raises UserError for a damaged record."""
    points = []
    for number, directory in directories.items():
        record = Record.read(directory / FILE)
        points += [Point(number, directory, tuple(record.overrides), row) for row in record.rows]
    return points


def pareto_set(points: Sequence[Point], cost: Cost) -> list[Point]:
    """Those that no other beats in validation accuracy and `cost`, the cheapest first."""
    about = [point for point in points if cost.is_about(point.row)]
    return [about[index] for index in pareto_front([(cost.of(p.row), p.row.accuracy_on("validation")) for p in about])]


def write_pareto(directory: Path, points: Sequence[Point], cost: Cost, title: str) -> None:
    """Writes `pareto.csv` and `pareto.png` of all `points` to `directory`."""
    front = pareto_set(points, cost)
    lines = [_line(directory, point, cost) for point in front]
    write_csv(directory / "pareto.csv", [*lines[0]], lines)
    _draw(directory / "pareto.png", [point for point in points if cost.is_about(point.row)], front, cost, title)


def _line(directory: Path, point: Point, cost: Cost) -> dict[str, Any]:
    row = point.row
    return {
        "trial": point.trial,
        "variant": row.name,
        "validation_accuracy": float(f"{row.accuracy_on('validation'):.6g}"),
        "test_accuracy": float(f"{row.accuracy_on('test'):.6g}"),
        **({"latency_ms": float(f"{row.latency_ms:.6g}")} if cost.column == "latency_ms" else {}),
        "bytes": row.bytes,
        "file": (point.directory / row.file).relative_to(directory).as_posix() if row.file else "",
        "overrides": shlex.join(point.overrides),
    }


def _draw(path: Path, points: Sequence[Point], front: Sequence[Point], cost: Cost, title: str) -> None:
    figure = Figure(figsize=(7.5, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*_places(points, cost), marker="o", markersize=4, color="0.75", linestyle="none", label="all variants")
    axes.step(
        *_places(front, cost),
        where="post",
        marker="o",
        markersize=6,
        color="tab:blue",
        label="Pareto set (trial, variant)",
    )
    axes.margins(x=0.15, y=0.2)
    name_axes(axes, title, f"{cost.name}, {cost.unit}", "validation accuracy, %")
    axes.legend(loc="lower right", fontsize=8, framealpha=0.9)
    _label(figure, axes, front, cost)
    write_atomically(path, lambda temporary: figure.savefig(temporary))


def _label(figure: Figure, axes: Axes, front: Sequence[Point], cost: Cost) -> None:
    """Names the points above and to the left of the front, where nothing else is; close ones above each other."""
    figure.draw_without_rendering()  # only then it is known where on the paper they lie
    before, height = -math.inf, -math.inf
    for point, x, y in zip(front, *_places(front, cost), strict=True):
        right, up = axes.transData.transform((x, y)) * 72 / figure.dpi
        height = max(up + 4, height + LINE) if right - before < WIDTH else up + 4
        before = right
        axes.annotate(
            f"{point.trial}, {point.row.name}",
            (x, y),
            textcoords="offset points",
            xytext=(-4, height - up),
            ha="right",
            va="bottom",
            fontsize=7,
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "relpos": (1, 0)},
        )


def _places(points: Sequence[Point], cost: Cost) -> tuple[list[float], list[float]]:
    return [cost.in_units(p.row) for p in points], [100 * p.row.accuracy_on("validation") for p in points]
