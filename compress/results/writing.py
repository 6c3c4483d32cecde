"""The files that say what came out of a run: table, pictures and, last, the record."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from rich.markup import escape

from compress.files import write_json
from compress.progress import console
from compress.results.layer_pictures import draw_layers, draw_weights, panels
from compress.results.picture import draw_tradeoff
from compress.results.tradeoff import Row, table, write_csv
from compress.results.wandb_run import log_results


def write_results(
    directory: Path,
    variants: Any,
    record: Mapping[str, Any],
    title: str,
    teacher_accuracy: float | None = None,
    loggers: Sequence[Logger] = (),
) -> dict[str, Any]:
    """Writes and returns `record` with the trade-off and the layers added; the other files before it.

    teacher_accuracy: on the test set, 0..1. loggers: those of the run, some of which take files and tables.
    """
    write_csv(directory / "tradeoff.csv", variants.rows)
    draw_tradeoff(directory / "tradeoff.png", variants.rows, title, teacher_accuracy)
    if variants.layers:
        draw_layers(directory / "layers.png", variants.layers, title)
        drawn = {
            name.removeprefix("student-"): panels(variants.student, each) for name, each in variants.quantized.items()
        }
        draw_weights(directory / "weights.png", drawn, title)
    whole = {**record, "tradeoff": [asdict(row) for row in variants.rows], "layers": variants.layers}
    log_results(loggers, variants.rows, whole)
    # Last, because its presence says that the run is finished.
    write_json(directory / "result.json", whole)
    return whole


def show(directory: Path, rows: Sequence[Row], title: str) -> None:
    """Prints the table, and what lies in `directory`."""
    console.print()
    console.print(table(rows, escape(title)))
    names = ["tradeoff.csv", "tradeoff.png", "layers.png", "weights.png", "result.json", "config.yaml", "models/"]
    there = [name for name in [*names, "checkpoints/"] if (directory / name).exists()]
    here = Path.cwd()
    place = directory.relative_to(here) if directory.is_relative_to(here) else directory
    console.print(f"results in {place}/: {', '.join(there)}")
