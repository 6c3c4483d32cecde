"""`layers.png` and `weights.png`: what quantization did to each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn

from compress.files import write_atomically
from compress.quantization import QuantizedModel, fold_batch_norm

SHOWN = 4  # layers of a variant whose weights are drawn
BINS = 160


def draw_layers(path: Path, layers: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Relative output error and bits of each layer, a line for each packed file; `layers` is that of `result.json`."""
    names = list(dict.fromkeys(name for each in layers.values() for name in each["quantized"]))
    figure = Figure(figsize=(max(7.5, 0.3 * len(names)), 6.0), dpi=150, layout="constrained")
    errors, widths = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    positions = {name: index for index, name in enumerate(names)}
    for index, (file, each) in enumerate(layers.items()):
        own = each["quantized"]
        places = [positions[name] for name in own]
        label = file.removesuffix(".safetensors").removeprefix("student-")
        # Of a network that was trained on its grids no layer has an error, and an error of 0 has no logarithm.
        found = [(place, layer["error"]) for place, layer in zip(places, own.values(), strict=True) if layer["error"]]
        if found:
            errors.plot(*zip(*found, strict=True), marker="o", markersize=3, linewidth=1, color=f"C{index}")
        widths.step(
            places,
            [layer["bits"] for layer in own.values()],
            where="mid",
            marker="_",
            color=f"C{index}",
            linewidth=1.4,
            label=label,
        )
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
    write_atomically(path, lambda temporary: figure.savefig(temporary))


@dataclass(frozen=True)
class Panel:
    """Weights of one layer in units of its channels' scales: `floats` before, and the whole `steps` after."""

    title: str
    floats: np.ndarray
    steps: np.ndarray


def panels(student: nn.Module, quantized: QuantizedModel) -> list[Panel]:
    """The first and the last layer and the two of largest error between, of `quantized`, made from `student`."""
    names = list(quantized.layers)
    inner = sorted(names[1:-1], key=lambda name: -(quantized.layers[name].error or 0))[: SHOWN - 2]
    chosen = [name for name in names if name in (names[0], names[-1], *inner)]
    analog = fold_batch_norm(student)
    found = []
    for name in chosen:
        layer = quantized.layers[name]
        weight = analog.get_submodule(name).weight.detach().flatten(1).cpu()
        floats = weight / layer.grid.scale.cpu()[:, None]
        steps = layer.codes.flatten(1).cpu().int() - layer.grid.zero_point.cpu().int()[:, None]
        found.append(Panel(f"{name}, {layer.bits} bit", floats.numpy().ravel(), steps.numpy().ravel()))
    return found


def draw_weights(path: Path, rows: Mapping[str, Sequence[Panel]], title: str) -> None:
    """A row of histograms for each variant: the weights before (filled) and the share of each grid point (bars)."""
    columns = max(len(row) for row in rows.values())
    figure = Figure(figsize=(3.2 * columns, 2.4 * len(rows) + 0.5), dpi=130, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for (label, row), line in zip(rows.items(), grid, strict=True):
        for axes in line[len(row) :]:
            axes.set_axis_off()
        line[0].set_ylabel(label, fontsize=9)
        for panel, axes in zip(row, line, strict=False):
            values, counts = np.unique(panel.steps, return_counts=True)
            # Beyond the grid by a step at most, where a few clipped weights would squeeze everything else.
            low, high = values.min() - 1.5, values.max() + 1.5
            axes.hist(
                panel.floats.clip(low, high), bins=BINS, range=(low, high), density=True, color="tab:blue", alpha=0.45
            )
            width = 0.16 if len(values) < 40 else 0.8
            axes.bar(values, counts / counts.sum(), width=width, color="tab:orange", alpha=0.8)
            axes.set_title(panel.title, fontsize=8)
            axes.tick_params(labelsize=7)
            axes.set_yticks([])
    figure.supxlabel("weight, in steps of its channel's grid (blue: float; orange: on the grid)", fontsize=9)
    figure.suptitle(title, fontsize=10)
    write_atomically(path, lambda temporary: figure.savefig(temporary))
