"""`tradeoff.png`: test accuracy, or without labels the agreement with fp32, against the bytes of the file."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from compress.files import write_atomically
from compress.results.tradeoff import Row


def draw_tradeoff(path: Path, rows: Sequence[Row], title: str, teacher_accuracy: float | None = None) -> None:
    """Draws the rows, the float32 student (first row) and, if given, the teacher's test accuracy (0..1) as lines."""
    figure = Figure(figsize=(7.5, 4.6), dpi=150)
    set_margins(figure, left=0.75, right=0.15, bottom=0.6, top=0.4)
    axes = figure.add_subplot()
    reference, variants = rows[0], rows[1:]
    labelled = reference.test_accuracy is not None

    def percent(row: Row) -> float:
        return 100 * (row.accuracy_on("test") if labelled else row.agreement)

    axes.axhline(percent(reference), color="0.6", linewidth=1, linestyle="--", label="student, fp32")
    if teacher_accuracy is not None:
        axes.axhline(100 * teacher_accuracy, color="0.2", linewidth=1, linestyle=":", label="teacher, fp32")
    for family in dict.fromkeys(map(_family, variants)):
        members = sorted((row for row in variants if _family(row) == family), key=lambda row: row.bytes)
        kilobytes, accuracies = [row.bytes / 1e3 for row in members], [percent(row) for row in members]
        axes.plot(kilobytes, accuracies, marker="o", label=family)
    axes.plot(reference.bytes / 1e3, percent(reference), marker="s", color="0.35", linestyle="none")
    for row in rows:
        axes.annotate(
            row.width.removesuffix(" bits/weight"),
            (row.bytes / 1e3, percent(row)),
            textcoords="offset points",
            # The packed file of the same network is as accurate and about as large, and rates lie among widths.
            xytext=(0, -14 if row.runtime == "torch" and not row.coded else 7),
            ha="center",
            fontsize=8,
        )
    axes.margins(x=0.08, y=0.25)
    name_axes(axes, title, "size of the file, kB", "test accuracy, %" if labelled else "same class as fp32, %")
    axes.legend(loc="lower right", fontsize=8, framealpha=0.9)
    write_atomically(path, figure.savefig)


def set_margins(figure: Figure, left: float, right: float, bottom: float, top: float) -> None:
    """Leaves so many inches around the axes; a layout engine takes as long again as the drawing to find them."""
    width, height = figure.get_size_inches()
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)


def name_axes(axes: Axes, title: str, cost: str, accuracy: str) -> None:
    """The `cost`, logarithmic, below, and the `accuracy` on the left."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.9g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"{cost} (logarithmic)")
    axes.set_ylabel(accuracy)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)


def _family(row: Row) -> str:
    """What the rows of one line of the picture have in common."""
    name = "fp32" if row.quantizer == "none" else row.quantizer
    if row.coded:
        name += ", coded bits/weight"
    inputs = f", inputs {row.activation_bits} bit" if row.activation_bits < 32 else ""
    return f"{name}{inputs}" + ("" if row.runtime == "torch" else f", {row.runtime}")
