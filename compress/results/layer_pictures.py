"""`layers.png` and `weights.png`: what quantization did to each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from compress.files import write_atomically
from compress.results.record import FileLayers

# Fewer grid points than this are drawn as bars of their own.
THIN_BARS = 40
BINS = 160


def draw_layers(path: Path, files: Mapping[str, FileLayers], title: str) -> None:
    """Relative output error and bits of each layer, a line for each packed file, given by name."""
    names = list(dict.fromkeys(name for layers in files.values() for name in layers.quantized))
    positions = {name: index for index, name in enumerate(names)}
    figure = Figure(figsize=(max(7.5, 0.3 * len(names)), 6.0), dpi=150, layout="constrained")
    errors, widths = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    for index, (file, layers) in enumerate(files.items()):
        colour, label = f"C{index}", file.removesuffix(".safetensors").removeprefix("student-")
        # Of a network that was trained on its grids no layer has an error, and an error of 0 has no logarithm.
        points = [(positions[name], layer.error) for name, layer in layers.quantized.items() if layer.error]
        if points:
            errors.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, color=colour)
        places = [positions[name] for name in layers.quantized]
        bits = [layer.bits for layer in layers.quantized.values()]
        widths.step(places, bits, where="mid", marker="_", color=colour, linewidth=1.4, label=label)
    if errors.lines:
        errors.set_yscale("log")
    errors.set_ylabel("relative error of the output")
    errors.set_title(title, fontsize=10)
    widths.set_ylabel("bits")
    widths.set_ylim(bottom=0)
    widths.yaxis.set_major_locator(MaxNLocator(integer=True))
    widths.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    for axes in (errors, widths):
        axes.grid(alpha=0.25)
    widths.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    write_atomically(path, figure.savefig)


@dataclass(frozen=True)
class Panel:
    """Weights of one layer in units of its channels' scales: `floats` before, and the integer `steps` after."""

    title: str
    floats: np.ndarray
    steps: np.ndarray


def draw_weights(path: Path, variants: Mapping[str, Sequence[Panel]], title: str) -> None:
    """A row of histograms for each variant: the weights before (filled) and the share of each grid point (bars)."""
    columns = max(len(panels) for panels in variants.values())
    figure = Figure(figsize=(3.2 * columns, 2.4 * len(variants) + 0.5), dpi=130, layout="constrained")
    grid = figure.subplots(len(variants), columns, squeeze=False)
    for (label, panels), line in zip(variants.items(), grid, strict=True):
        line[0].set_ylabel(label, fontsize=9)
        for panel, axes in zip(panels, line, strict=False):
            _histogram(axes, panel)
        for axes in line[len(panels) :]:
            axes.set_axis_off()
    figure.supxlabel("weight, in steps of its channel's grid (blue: float; orange: on the grid)", fontsize=9)
    figure.suptitle(title, fontsize=10)
    write_atomically(path, figure.savefig)


def _histogram(axes: Axes, panel: Panel) -> None:
    values, counts = np.unique(panel.steps, return_counts=True)
    # Beyond the grid by a step at most, where a few clipped weights would squeeze everything else.
    low, high = values.min() - 1.5, values.max() + 1.5
    floats = panel.floats.clip(low, high)
    axes.hist(floats, bins=BINS, range=(low, high), density=True, color="tab:blue", alpha=0.45, histtype="stepfilled")
    if len(values) < THIN_BARS:
        axes.bar(values, counts / counts.sum(), width=0.16, color="tab:orange", alpha=0.8)
    else:
        # One outline: hundreds of bars in every panel take seconds to draw.
        edges = np.arange(values.min() - 0.5, values.max() + 1)
        shares = np.histogram(panel.steps, edges)[0] / counts.sum()
        axes.stairs(shares, edges, fill=True, color="tab:orange", alpha=0.8)
    axes.set_title(panel.title, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.set_yticks([])
