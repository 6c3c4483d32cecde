"""A finished run, read back from its directory; needs neither PyTorch nor Hydra.

`result.json`, `config.yaml` and `metrics.csv` are read; what they hold is described in `compress.results.record`.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from compress.errors import UserError
from compress.results.tradeoff import Row

# libyaml is ten times faster, and not in every build of PyYAML.
YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MOST_POINTS = 300
# They change neither what is trained nor the images: where files lie and what is said meanwhile.
NOT_COMPARED = ("seed", "output_directory", "logger", "data.root", "trainer.log_every", "trainer.stem")


@dataclass(frozen=True)
class Layer:
    """A quantized layer: width of its codes in bits, relative error of its outputs (None where it is not known)."""

    name: str
    bits: int
    error: float | None


@dataclass(frozen=True)
class Run:
    """One finished run.

    `name` is its directory relative to the one that holds all runs. `data` names the images, with the limit where
    they were a slice; only accuracies of equal `data` compare. `overrides` is what was typed; `settings` is the
    whole configuration as `{"optimizer.lr": 0.001}`, without what is in NOT_COMPARED. `layers` is by file as in the
    rows, in the order of the network. `curves` has (epochs, values) for each metric, at most MOST_POINTS of them.
    `train_images` and `parameters` are counts; accuracies are 0..1.
    """

    directory: Path
    name: str
    method: str
    student: str
    teacher: str
    teacher_accuracy: float | None
    data: str
    experiment: str
    seed: int
    started: str
    seconds: float
    epochs: int | None
    parameters: int | None
    train_images: int | None
    overrides: tuple[str, ...]
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    layers: Mapping[str, tuple[Layer, ...]]
    curves: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]


class _Part(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


_Share = Annotated[float, Field(ge=0, le=1)]
_Size = Annotated[int, Field(gt=0)]
_Bits = Annotated[float, Field(gt=0)]
_NEEDED = {"quantizer": str, "bits": _Bits, "test_accuracy": _Share, "bytes": _Size, "file": str}
# Columns that later versions add or that earlier ones did not have are no damage.
_Row = create_model(
    "_Row",
    __base__=_Part,
    **{
        each.name: (_NEEDED.get(each.name, each.type | None), ... if each.name in _NEEDED else None)
        for each in fields(Row)
    },
)


class _Data(_Part):
    name: str
    images: dict[str, int] = {}


class _Student(_Part):
    model: str
    parameters: int | None = None
    epochs: int | None = None


class _Teacher(_Part):
    model: str
    test_accuracy: _Share | None = None


class _Record(_Part):
    seed: int
    data: _Data
    student: _Student
    tradeoff: Annotated[list[_Row], Field(min_length=1)]
    teacher: _Teacher | None = None
    overrides: list[str] = []
    started: str = ""
    seconds: dict[str, float] = {}


class _Layer(_Part):
    bits: int
    error: float | None = None


class _NamedLayer(_Layer):
    name: str


_LAYERS, _NAMED_LAYERS = TypeAdapter(dict[str, _Layer]), TypeAdapter(list[_NamedLayer])


def read_run(directory: Path, name: str, problems: list[str]) -> Run:
    """The finished run in `directory`; lines are added to `problems` for what it can do without.

    Raises UserError, which names the file, where `result.json` or `config.yaml` cannot be read.
    """
    raw = _read(directory / "result.json", json.loads)
    try:
        record = _Record.model_validate(raw)
    except ValidationError as failure:
        error = failure.errors()[0]
        where = ".".join(map(str, error["loc"])) or "content"
        raise UserError(f"{directory / 'result.json'}: {where}: {error['msg'].lower()}") from None
    config = _read(directory / "config.yaml", lambda text: yaml.load(text, YAML))
    if not isinstance(config, dict):
        raise UserError(f"{directory / 'config.yaml'}: found no mapping")
    settings = {key: value for key, value in flattened(config).items() if not _starts(key, NOT_COMPARED)}
    typed = dict(override.lstrip("+").partition("=")[::2] for override in record.overrides)
    rows = tuple(Row(**{each.name: getattr(row, each.name) for each in fields(Row)}) for row in record.tradeoff)
    return Run(
        directory=directory,
        name=name,
        method=settings.get("method.stem", "unknown"),
        student=record.student.model,
        teacher=record.teacher.model if record.teacher else "",
        teacher_accuracy=record.teacher.test_accuracy if record.teacher else None,
        data=_data_name(record.data.name, config),
        experiment=typed.get("experiment", ""),
        seed=record.seed,
        started=record.started,
        seconds=sum(record.seconds.values()),
        epochs=record.student.epochs,
        parameters=record.student.parameters,
        train_images=record.data.images.get("train"),
        overrides=tuple(record.overrides),
        settings=settings,
        rows=rows,
        layers=_layers(raw, rows, directory, problems),
        curves=_curves(directory / "metrics.csv", problems),
    )


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; lists and empty mappings stay whole."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _starts(key: str, stems: Sequence[str]) -> bool:
    return any(key == stem or key.startswith(f"{stem}.") for stem in stems)


def _read(path: Path, parse: Any) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise UserError(f"{path}: cannot be read ({failure.strerror})") from None
    except (ValueError, RecursionError, yaml.YAMLError):
        raise UserError(f"{path}: damaged, it cannot be parsed") from None


def _data_name(name: str, config: Mapping[str, Any]) -> str:
    data = config.get("data") or {}
    if name == "Folder":
        name = f"{name} {Path(str(data.get('root'))).name}"
    return f"{name} ({data['limit']:,} images)" if isinstance(data.get("limit"), int) else name


def _layers(
    raw: Mapping[str, Any], rows: Sequence[Row], directory: Path, problems: list[str]
) -> dict[str, tuple[Layer, ...]]:
    """By file; from `layers`, and from `variants`, one entry per row, where a record has them."""
    found = {}
    try:
        for row in rows:
            of_file = (raw.get("layers") or {}).get(Path(row.file).name)
            if of_file:
                layers = _LAYERS.validate_python(of_file["quantized"])
                found[row.file] = tuple(Layer(name, each.bits, each.error) for name, each in layers.items())
        for index, variant in enumerate(raw.get("variants") or []):
            layers = _NAMED_LAYERS.validate_python(variant.get("layers") or [])
            if layers:
                file = variant.get("file") or rows[index].file
                found[file] = tuple(Layer(each.name, each.bits, each.error) for each in layers)
    except (ValidationError, AttributeError, KeyError, IndexError, TypeError):
        problems.append(f"{directory / 'result.json'}: the entries of the layers are damaged; shown without them")
        return {}
    return found


def _curves(path: Path, problems: list[str]) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Metrics by epoch; none where there is no file. The trade-off's columns are not a course of anything."""
    if not path.exists():
        return {}
    curves: dict[str, list[tuple[float, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream, strict=True)
            if "epoch" not in (reader.fieldnames or ()):
                raise ValueError("no column of epochs")
            for row in reader:
                if not row["epoch"]:
                    continue
                for name, value in row.items():
                    if value and name not in ("epoch", "step") and not name.startswith("tradeoff/"):
                        number = float(value)
                        if math.isfinite(number):
                            curves.setdefault(name, []).append((float(row["epoch"]), number))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error):
        problems.append(f"{path}: damaged, it cannot be parsed; shown without training curves")
        return {}
    return {name: tuple(zip(*_thinned(points), strict=True)) for name, points in curves.items()}


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS of the points at even distances, the first and the last among them."""
    if len(points) <= MOST_POINTS:
        return points
    step = (len(points) - 1) / (MOST_POINTS - 1)
    return [points[round(index * step)] for index in range(MOST_POINTS)]
