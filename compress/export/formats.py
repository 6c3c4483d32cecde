"""The formats of a run, those that `conf/export` names, and the one that a file has."""

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from compress import yaml_file
from compress.errors import UserError
from compress.export.exporter import Exporter
from compress.export.packed import Packed
from compress.models.own_class import OwnNetwork
from compress.paths import option_files
from compress.quantization import Quantizer

# The format in which every network is measured, and which the others are compared with.
REFERENCE = Packed()


def with_reference(exporters: Iterable[Exporter]) -> list[Exporter]:
    """The reference format, and `exporters` behind it."""
    return [REFERENCE, *(exporter for exporter in exporters if exporter != REFERENCE)]


def check_exporters(exporters: Iterable[Exporter], quantizer: Quantizer | None) -> None:
    """Raises UserError for formats that would write the same files, lack a package or cannot hold what they get."""
    exporters = with_reference(exporters)
    for attribute in ("suffix", "runtime"):
        values = [getattr(exporter, attribute) for exporter in exporters]
        shared = next((value for value in values if values.count(value) > 1), None)
        if shared is not None:
            raise UserError(
                f"export: found two formats with the {attribute} {shared}; accepted: formats that differ in it"
            )
    for exporter in exporters:
        exporter.check(quantizer)


def available() -> list[Exporter]:
    """An exporter, with its default options, of each class that the options in `conf/export` name.

    Raises UserError, naming the YAML file, for a class that cannot be imported.
    """
    files = {
        node["_target_"]: file
        for file in option_files("export").values()
        for node in (yaml_file.read(file) or {}).values()
    }
    exporters = []
    for target, file in sorted(files.items()):
        module, _, name = target.rpartition(".")
        try:
            exporters.append(getattr(import_module(module), name)())
        except (ImportError, AttributeError):
            raise UserError(f"{file}: found {target!r}, which cannot be imported; accepted: a class") from None
    return exporters


def exporter_called(name: str) -> Exporter:
    """The exporter, with its default options, of the node `name` in `conf/export`. Raises UserError where none is."""
    nodes: dict[str, str] = {}
    for file in option_files("export").values():
        content = yaml_file.read(file) or {}
        nodes |= {key: node["_target_"] for key, node in content.items()}
    if name not in nodes:
        raise UserError(f"format: found {name!r}; accepted: {', '.join(sorted(nodes))}")
    module, _, last = nodes[name].rpartition(".")
    exporter: Exporter = getattr(import_module(module), last)()
    return exporter


def read_any(path: Path, threads: int = 1, network: OwnNetwork | None = None) -> tuple[Any, dict[str, Any]]:
    """(model, description) of a file of any format, see `Exporter.read`; `network`: one of the user's own class."""
    exporter = exporter_of(path)
    if network is not None and not exporter.takes_network:
        raise UserError(f"{path}: found network= for a {exporter.suffix} file, which needs none; accepted: no network=")
    return read_back(exporter, path, threads, network)


def read_back(
    exporter: Exporter, path: Path, threads: int = 1, own_network: OwnNetwork | None = None
) -> tuple[Any, dict[str, Any]]:
    """(model, description) of a file that `exporter` wrote of `own_network`, if it is of the user's own class."""
    own = {} if own_network is None or not exporter.takes_network else {"network": own_network}
    return exporter.read(path, threads, **own)


def files_of(path: Path) -> list[Path]:
    """The model file `path` and those that it needs beside it; of a format that is not to be found, itself alone."""
    try:
        return [path, *exporter_of(path).companions(path)]
    except UserError:
        return [path]


def exporter_of(path: Path) -> Exporter:
    """The exporter whose suffix the file has; of several the one with the longest. Raises UserError where none has."""
    exporters = available()
    fitting = [exporter for exporter in exporters if path.name.endswith(exporter.suffix)]
    if not fitting:
        suffixes = " or ".join(sorted(exporter.suffix for exporter in exporters))
        raise UserError(f"{path}: found no suffix of a model file; accepted: {suffixes}")
    return max(fitting, key=lambda exporter: len(exporter.suffix))
