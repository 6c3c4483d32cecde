"""Many runs in one picture: test accuracy against bytes, one line for each, means where they differ in the seed."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from compress.files import write_atomically
from compress.report.comparison import Group, Variant, groups
from compress.report.finished import Run
from compress.results.picture import name_axes

MARKERS = "osD^vPX*"


def draw_runs(path: Path, runs: Sequence[Run]) -> None:
    """Draws the torch variants of `runs`, a panel for each data set; equal runs of several seeds are one line."""
    found = groups(runs)
    data = list(dict.fromkeys(group.runs[0].data for group in found))
    figure = Figure(figsize=(8.5, 5.0 * len(data)), dpi=150, layout="constrained")
    for index, name in enumerate(data):
        axes = figure.add_subplot(len(data), 1, index + 1)
        own = [group for group in found if group.runs[0].data == name]
        labels = _labels(own)
        colours = colormaps["viridis" if len(own) > 2 else "tab10"]
        for number, (group, label) in enumerate(zip(own, labels, strict=True)):
            variants = sorted(
                (each for each in group.variants if each.row.runtime == "torch"), key=lambda each: each.bytes
            )
            axes.errorbar(
                [each.bytes / 1e6 for each in variants],
                [each.test.mean for each in variants],
                yerr=[each.test.deviation or 0.0 for each in variants],
                label=label,
                color=colours(number / max(len(own) - 1, 1) * 0.92 if len(own) > 2 else number),
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                linewidth=1.2,
                capsize=2,
            )
            if number == 0:
                for each in variants:
                    axes.annotate(
                        _width(each),
                        (each.bytes / 1e6, each.test.mean),
                        textcoords="offset points",
                        xytext=(0, 7),
                        ha="center",
                        fontsize=7,
                        color="0.35",
                    )
        axes.margins(x=0.06, y=0.12)
        name_axes(axes, name, "MB", "test accuracy, %")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary))


def _width(variant: Variant) -> str:
    return "fp32" if variant.row.quantizer == "none" else f"{variant.row.bits:.3g} bit"


def _labels(own: Sequence[Group]) -> list[str]:
    """What tells the groups apart: of method, student and what was typed, that in which they differ."""
    columns = [(group.runs[0].method, group.runs[0].student, group.settings) for group in own]
    told = [column for column in zip(*columns, strict=True) if len({*column}) > 1]
    return [" ".join(part for part in parts if part) for parts in zip(*told, strict=True)] or [columns[0][0]]
