"""A finished run, read back from its directory; needs neither PyTorch nor Hydra.

What `result.json` holds is described in `compress.results.record`; `config.yaml` and `metrics.csv` are read too.
"""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compress import yaml_file
from compress.checksums import checked_rows, read_text
from compress.errors import UserError
from compress.results.record import FILE, Layer, Record
from compress.results.tradeoff import Row

MOST_POINTS = 300
# Keys, or nodes, that change neither what is trained nor the images: where files lie and what is said meanwhile.
NOT_COMPARED = ("seed.", "output_directory.", "logger.", "data.root.", "trainer.log_every.", "trainer.stem.")


@dataclass(frozen=True)
class Run:
    """One finished run.

    `name` is its directory relative to the one that holds all runs. `method` is the word that chose it. `data` names
    the images, with the limit where they were a slice; only accuracies of equal `data` compare. `settings` is the
    configuration as `{"optimizer.lr": 0.001}`, without what is in NOT_COMPARED. `curves` has (epochs, values)
    for each metric, at most MOST_POINTS of them.
    """

    directory: Path
    name: str
    record: Record
    method: str
    data: str
    experiment: str
    settings: Mapping[str, Any]
    curves: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.record.rows

    @property
    def student(self) -> str:
        return self.record.student.model

    @property
    def teacher(self) -> str:
        """Its stem, or nothing where there was none."""
        return self.record.teacher.model if self.record.teacher else ""

    @property
    def seed(self) -> int:
        return self.record.seed

    def layers(self, row: Row) -> Mapping[str, Layer]:
        """The quantized layers of the file of a `row`, by name, in the order of the network."""
        layers = self.record.layers.get(Path(row.file).name)
        return layers.quantized if layers else {}


def read_run(directory: Path, name: str, problems: list[str]) -> Run:
    """The finished run in `directory`; a line is added to `problems` where it has to do without its curves.

    Raises UserError, which names the file, where `result.json` or `config.yaml` cannot be read, and where there is no
    accuracy to report.
    """
    record = Record.read(directory / FILE)
    if any(row.test_accuracy is None for row in record.rows):
        raise UserError(f"{directory / FILE}: found no accuracy, because the images had no labels")
    config = _read_config(directory / "config.yaml")
    settings = flattened(config)
    typed = dict(override.lstrip("+").partition("=")[::2] for override in record.overrides)
    return Run(
        directory=directory,
        name=name,
        record=record,
        method=settings.get("method.stem") or "none",
        data=_data_name(record.data.name, config),
        experiment=typed.get("experiment", ""),
        settings={key: value for key, value in settings.items() if not f"{key}.".startswith(NOT_COMPARED)},
        curves=_curves(directory / "metrics.csv", problems),
    )


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; lists and empty mappings stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml_file.load(read_text(path))
    except OSError as failure:
        raise UserError(f"{path}: cannot be read ({failure.strerror})") from None
    except (ValueError, RecursionError, yaml.YAMLError):
        raise UserError(f"{path}: damaged, it cannot be parsed") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: found no mapping")
    return config


def _data_name(name: str, config: Mapping[str, Any]) -> str:
    data = config.get("data") or {}
    if name == "Folder":
        name = f"{name} {Path(str(data.get('root'))).name}"
    return f"{name} ({data['limit']:,} images)" if isinstance(data.get("limit"), int) else name


def _curves(path: Path, problems: list[str]) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Metrics by epoch, without those of the trade-off, which have no course; none where there is no file."""
    if not path.exists():
        return {}
    curves: dict[str, list[tuple[float, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream, strict=True)
            if "epoch" not in (reader.fieldnames or ()):
                raise ValueError("no column of epochs")
            for row in checked_rows(reader):
                if "epoch" not in row:
                    continue
                for name, value in row.items():
                    if name not in ("epoch", "step") and not name.startswith("tradeoff/"):
                        number = float(value)
                        if math.isfinite(number):
                            curves.setdefault(name, []).append((float(row["epoch"]), number))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error):
        problems.append(f"{path}: damaged, it cannot be parsed; shown without training curves")
        return {}
    return {name: _thinned(points) for name, points in curves.items()}


def _thinned(points: list[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Epochs and values of at most MOST_POINTS of the points at even distances, the first and the last among them."""
    if len(points) > MOST_POINTS:
        step = (len(points) - 1) / (MOST_POINTS - 1)
        points = [points[round(index * step)] for index in range(MOST_POINTS)]
    epochs, values = zip(*points, strict=True)
    return epochs, values
