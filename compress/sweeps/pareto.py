"""What a search found: the Pareto set of validation accuracy and bytes, as `pareto.csv` and `pareto.png`.

| column | meaning |
|---|---|
| trial | number of the trial, which is also its directory in `trials/` |
| variant | the row of the run's trade-off, such as `gpfq 3 bit` |
| validation_accuracy | 0..1, what was searched by |
| test_accuracy | 0..1, which nothing was chosen by |
| bytes, file | of the written model, relative to the folder of the CSV |
| overrides | what `scripts/run.py` takes to repeat the run |
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from compress.files import write_atomically, write_csv
from compress.report.comparison import pareto_front
from compress.results.record import FILE, Record
from compress.results.tradeoff import Row
from compress.results.tradeoff_picture import name_axes

# Of a label in the picture, in points.
LINE, WIDTH = 9, 75
COLUMNS = ("trial", "variant", "validation_accuracy", "test_accuracy", "bytes", "file", "overrides")


@dataclass(frozen=True)
class Point:
    """One variant of one trial; `directory` is the trial's, `overrides` all of its run's."""

    trial: int
    directory: Path
    overrides: tuple[str, ...]
    row: Row


def chosen(rows: Sequence[Row]) -> Row:
    """The row that stands for a run: the best validation accuracy among the quantized ones, the smallest of equals."""
    variants = [row for row in rows if row.quantizer != "none"] or rows
    return max(variants, key=lambda row: (row.accuracy_on("validation"), -row.bytes))


def read_points(directories: Mapping[int, Path]) -> list[Point]:
    """Every variant of the finished trials, given as directory by number. Raises UserError for a damaged record."""
    points = []
    for number, directory in directories.items():
        record = Record.read(directory / FILE)
        points += [Point(number, directory, tuple(record.overrides), row) for row in record.rows]
    return points


def pareto_set(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in validation accuracy and bytes, the smallest file first."""
    return [points[index] for index in pareto_front([(p.row.bytes, p.row.accuracy_on("validation")) for p in points])]


def write_pareto(directory: Path, points: Sequence[Point], title: str) -> None:
    """Writes `pareto.csv` and `pareto.png` of all `points` to `directory`."""
    front = pareto_set(points)
    write_csv(directory / "pareto.csv", COLUMNS, [_line(directory, point) for point in front])
    _draw(directory / "pareto.png", points, front, title)


def _line(directory: Path, point: Point) -> dict[str, Any]:
    row = point.row
    return {
        "trial": point.trial,
        "variant": row.name,
        "validation_accuracy": float(f"{row.accuracy_on('validation'):.6g}"),
        "test_accuracy": float(f"{row.accuracy_on('test'):.6g}"),
        "bytes": row.bytes,
        "file": (point.directory / row.file).relative_to(directory).as_posix() if row.file else "",
        "overrides": shlex.join(point.overrides),
    }


def _draw(path: Path, points: Sequence[Point], front: Sequence[Point], title: str) -> None:
    figure = Figure(figsize=(7.5, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*_places(points), marker="o", markersize=4, color="0.75", linestyle="none", label="all variants")
    axes.step(
        *_places(front), where="post", marker="o", markersize=6, color="tab:blue", label="Pareto set (trial, variant)"
    )
    axes.margins(x=0.15, y=0.2)
    name_axes(axes, title, "kB", "validation accuracy, %")
    axes.legend(loc="lower right", fontsize=8, framealpha=0.9)
    _label(figure, axes, front)
    write_atomically(path, lambda temporary: figure.savefig(temporary))


def _label(figure: Figure, axes: Axes, front: Sequence[Point]) -> None:
    """Names the points above and to the left of the front, where nothing else is; close ones above each other."""
    figure.draw_without_rendering()  # only then it is known where on the paper they lie
    before, height = -math.inf, -math.inf
    for point, x, y in zip(front, *_places(front), strict=True):
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


def _places(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [p.row.bytes / 1e3 for p in points], [100 * p.row.accuracy_on("validation") for p in points]
