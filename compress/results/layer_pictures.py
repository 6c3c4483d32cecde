"""`layers.png` and `weights.png`: what quantization did to each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from compress.files import write_atomically
from compress.results.record import FileLayers
from compress.results.tradeoff_picture import set_margins

# Fewer grid points than this are drawn as bars of their own.
THIN_BARS = 40
BINS = 160
NAME_SIZE, LABEL_SIZE = 7, 8  # points


def draw_layers(path: Path, files: Mapping[str, FileLayers], title: str) -> None:
    """Relative output error and bits of each layer, a line for each packed file, given by name.

    Where networks have rates, the sensitivity of the layers, by which their bits were shared out, is below.
    """
    names = list(dict.fromkeys(name for layers in files.values() for name in layers.quantized))
    positions = {name: index for index, name in enumerate(names)}
    labels = [file.removesuffix(".safetensors").removeprefix("student-") for file in files]
    below, beside = 0.2 + _inches(names, NAME_SIZE), 0.7 + _inches(labels, LABEL_SIZE)
    # Measured once for all rates.
    sensitivities = {
        name: layer.sensitivity
        for layers in files.values()
        for name, layer in layers.quantized.items()
        if layer.sensitivity is not None
    }
    ratios = (3, 2, 1.4) if sensitivities else (3, 2)
    figure = Figure(figsize=(0.75 + max(6.0, 0.3 * len(names)) + beside, sum(ratios) + below), dpi=150)
    set_margins(figure, left=0.75, right=beside, bottom=below, top=0.4)
    every = figure.subplots(len(ratios), sharex=True, height_ratios=ratios, gridspec_kw={"hspace": 0.06})
    errors, widths = every[:2]
    for index, (label, layers) in enumerate(zip(labels, files.values(), strict=True)):
        colour = f"C{index}"
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
    if sensitivities:
        places = [positions[name] for name in sensitivities]
        every[-1].plot(places, list(sensitivities.values()), marker="o", markersize=3, linewidth=1, color="0.3")
        every[-1].set_yscale("log")
        every[-1].set_ylabel("sensitivity, nats")
    every[-1].set_xticks(range(len(names)), names, rotation=90, fontsize=NAME_SIZE)
    for axes in every:
        axes.grid(alpha=0.25)
    widths.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=LABEL_SIZE)
    write_atomically(path, figure.savefig)


def _inches(words: Sequence[str], points: float) -> float:
    """About the length of the longest of some words, whose characters are 0.65 of the size of the font wide."""
    return 0.65 * points / 72 * max(map(len, words))


@dataclass(frozen=True)
class Panel:
    """Weights of one layer in units of its channels' scales: `floats` before, and the integer `steps` after."""

    title: str
    floats: np.ndarray
    steps: np.ndarray


def draw_weights(path: Path, variants: Mapping[str, Sequence[Panel]], title: str) -> None:
    """A row of histograms for each variant: the weights before (filled) and the share of each grid point (bars)."""
    columns = max(len(panels) for panels in variants.values())
    figure = Figure(figsize=(3.2 * columns, 2.4 * len(variants) + 0.9), dpi=130)
    set_margins(figure, left=0.4, right=0.15, bottom=0.6, top=0.6)
    grid = figure.subplots(len(variants), columns, squeeze=False, gridspec_kw={"wspace": 0.06, "hspace": 0.25})
    for (label, panels), line in zip(variants.items(), grid, strict=True):
        line[0].set_ylabel(label, fontsize=9)
        for panel, axes in zip(panels, line, strict=False):
            _histogram(axes, panel)
        for axes in line[len(panels) :]:
            axes.set_axis_off()
    figure.supxlabel(
        "weight, in steps of its channel's grid (blue: float; orange: on the grid)",
        fontsize=9,
        y=0.1 / figure.get_figheight(),
    )
    figure.suptitle(title, fontsize=10, y=1 - 0.1 / figure.get_figheight())
    write_atomically(path, figure.savefig)


def _histogram(axes: Axes, panel: Panel) -> None:
    values, counts = np.unique(panel.steps, return_counts=True)
    # Beyond the grid by a step at most, where a few clipped weights would squeeze everything else.
    low, high = values.min() - 1.5, values.max() + 1.5
    shares, edges = np.histogram(panel.floats.clip(low, high), BINS, (low, high), density=True)
    _fill(axes, edges, np.append(shares, 0), color="tab:blue", alpha=0.45)
    half = 0.08 if len(values) < THIN_BARS else 0.5
    edges = np.stack([values - half, values + half], 1)
    _fill(axes, edges.ravel(), np.stack([counts / counts.sum(), 0 * counts], 1).ravel(), color="tab:orange", alpha=0.8)
    axes.set_ylim(bottom=0)
    axes.set_title(panel.title, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.set_yticks([])


def _fill(axes: Axes, edges: np.ndarray, heights: np.ndarray, **style: Any) -> None:
    """Bars from each edge to the next, in one outline: hundreds of rectangles in every panel take seconds to draw."""
    axes.fill_between(edges, heights, step="post", linewidth=0, **style)
