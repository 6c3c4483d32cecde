"""Many runs in one picture: test accuracy against bytes, one line for each, means where they differ in the seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from compress.files import write_atomically
from compress.report.comparison import Group, groups
from compress.report.finished import Run
from compress.results.tradeoff_picture import name_axes

MARKERS = "osD^vPX*"


def draw_runs(path: Path, runs: Sequence[Run]) -> None:
    """Draws the torch variants of `runs`, a panel for each data set; equal runs of several seeds are one line."""
    compared = groups(runs)
    data = list(dict.fromkeys(group.runs[0].data for group in compared))
    figure = Figure(figsize=(8.5, 5.0 * len(data)), dpi=150, layout="constrained")
    for index, name in enumerate(data):
        axes = figure.add_subplot(len(data), 1, index + 1)
        _draw_panel(axes, [group for group in compared if group.runs[0].data == name])
        axes.margins(x=0.06, y=0.12)
        name_axes(axes, name, "size of the file, kB", "test accuracy, %")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False)
    write_atomically(path, figure.savefig)


def _draw_panel(axes: Axes, compared: Sequence[Group]) -> None:
    many = len(compared) > 2
    colours = colormaps["viridis" if many else "tab10"]
    for number, (group, label) in enumerate(zip(compared, _labels(compared), strict=True)):
        colour = colours(number / (len(compared) - 1) * 0.92 if many else number)
        variants = [variant for variant in group.variants if variant.row.runtime == "torch"]
        variants.sort(key=lambda variant: variant.bytes)
        kilobytes = [variant.bytes / 1e3 for variant in variants]
        accuracies = [100 * variant.test_accuracy for variant in variants]
        deviations = [100 * (variant.deviation("test_accuracy") or 0.0) for variant in variants]
        style: dict[str, Any] = {
            "color": colour,
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": 4,
            "linewidth": 1.2,
        }
        axes.errorbar(kilobytes, accuracies, yerr=deviations, capsize=2, label=label, **style)
        if number == 0:  # the widths beside the points of one line
            offset: dict[str, Any] = {"textcoords": "offset points", "xytext": (0, 7), "ha": "center"}
            for variant, point in zip(variants, zip(kilobytes, accuracies, strict=True), strict=True):
                axes.annotate(variant.row.width, point, fontsize=7, color="0.35", **offset)


def _labels(compared: Sequence[Group]) -> list[str]:
    """What tells the groups apart: of method, student and what was typed, that in which they differ."""
    columns = [(group.runs[0].method, group.runs[0].student, group.settings) for group in compared]
    differing = [column for column in zip(*columns, strict=True) if len({*column}) > 1]
    return [" ".join(part for part in parts if part) for parts in zip(*differing, strict=True)] or [columns[0][0]]
