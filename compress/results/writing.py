"""The files that say what came out of a run: table, pictures and, last, the record."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pytorch_lightning.loggers import Logger
from rich.markup import escape

from compress.checksums import file_digest
from compress.export.formats import files_of
from compress.files import write_text
from compress.progress import console
from compress.results import card
from compress.results.layer_pictures import Panel, draw_layers, draw_weights
from compress.results.loggers import log_results
from compress.results.metrics_csv import FILE as METRICS
from compress.results.record import FILE, Record
from compress.results.tradeoff import table, write_tradeoff
from compress.results.tradeoff_picture import draw_tradeoff

FILES = (card.FILE, "tradeoff.csv", "tradeoff.png", "layers.png", "weights.png", "result.json", "config.yaml")


def write_results(
    directory: Path,
    record: Record,
    title: str,
    panels: Mapping[str, Sequence[Panel]] | None = None,
    loggers: Sequence[Logger] = (),
) -> Record:
    """Writes the `record` and, before it, card, table and pictures of its rows and layers; returns what it wrote.

    panels: some layers of each quantized variant, for `weights.png`. loggers: those of the run, some of which take
    files and tables.
    """
    write_tradeoff(directory / "tradeoff.csv", record.rows)
    teacher_accuracy = record.teacher.test_accuracy if record.teacher else None
    draw_tradeoff(directory / "tradeoff.png", record.rows, title, teacher_accuracy)
    if record.layers:
        draw_layers(directory / "layers.png", record.layers, title)
    if panels:
        draw_weights(directory / "weights.png", panels, title)
    files = [file.as_posix() for row in record.rows if row.file for file in files_of(Path(row.file))]
    models = {file: file_digest(directory / file) for file in files}
    write_text(directory / card.FILE, card.model_card(record, models))
    log_results(loggers, record)
    for logger in loggers:
        logger.save()
    # Last, because its presence says that the run is finished.
    record = record.model_copy(update={"files": _digests(directory) | models})
    record.write(directory)
    return record


def _digests(directory: Path) -> dict[str, str]:
    """The SHA-256 of what a run leaves but for its record, which has one of its own."""
    paths = [directory / name for name in (*FILES, METRICS) if name != FILE]
    paths += sorted([*directory.glob("models/*"), *directory.glob("checkpoints/*.ckpt")])
    return {path.relative_to(directory).as_posix(): file_digest(path) for path in paths if path.is_file()}


def show(directory: Path, record: Record, title: str) -> None:
    """Prints the table, of how many images its accuracies are, and what lies in `directory`."""
    console.print()
    console.print(table(record.rows, escape(title)))
    images = record.data.images
    counts = [f"{images[split]:,} {split}" for split in ("validation", "test") if split in images]
    if counts:
        console.print(f"accuracies are of {' and '.join(counts)} images")
    present = ", ".join(name for name in (*FILES, "models/", "checkpoints/") if (directory / name).exists())
    here = Path.cwd()
    place = directory.relative_to(here) if directory.is_relative_to(here) else directory
    console.print(f"results in {place}/: {present}")
