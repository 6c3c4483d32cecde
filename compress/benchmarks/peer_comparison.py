"""What this project and others make of the same trained networks: accuracy, bytes and seconds, and their table."""

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from compress.benchmarks.peers import ours
from compress.benchmarks.peers.setting import Quantize
from compress.config.recorded import read_config
from compress.cpu import processor
from compress.data.module import DataModule
from compress.errors import UserError
from compress.evaluation import evaluate
from compress.export.packed import read_model
from compress.models.baking import copied
from compress.pipeline.parts import Parts
from compress.results.markdown import markdown_table

PEERS = ("ours", "brevitas", "nncf", "aimet", "mct", "torchao")
IMAGES = 512
HEAD = (
    "by",
    "setting",
    "inputs",
    "test %",
    "change",
    "kB",
    "CPU seconds",
    "times `gpfq`",
    "file, and what runs it",
)


def peer_called(name: str) -> tuple[ModuleType, Mapping[str, Any]]:
    """The module in `compress.benchmarks.peers` and its settings. Raises UserError where its library is missing."""
    module = import_module(f"compress.benchmarks.peers.{name}")
    try:
        return module, module.settings()
    except ImportError as failure:
        raise UserError(f"{name}: found no {failure.name or failure}; accepted: {module.INSTALL}") from None


def opened(run: Path, allowed: Collection[str] = ()) -> tuple[DataModule, nn.Module, Tensor]:
    """The data of `run`, its float32 network and calibration images `(N, 3, H, W)`; `allowed`: see `read_config`."""
    data = Parts(read_config(run, allowed)).data
    network, _ = read_model(run / "models" / "student-fp32.safetensors")
    return data, network, torch.cat(data.calibration_batches(IMAGES))


def measure(
    run: Path,
    peer: str,
    known: dict[str, Any],
    save: Callable[[], None],
    turns: int = 1,
    allowed: Collection[str] = (),
    only: str = "",
    gauge: list[float] | None = None,
) -> None:
    """Adds to `known` a row for each setting of `peer` for the network of `run`; one that is there is not made again.

    only: a regular expression that the names of settings have to match. Each quantizes `turns` times; the gauge of all
    is `gpfq` at 8 bits for weights and inputs, which takes turns with the first where `gauge` does not have its seconds
    yet. `save` is called after each row, and `allowed` is as in `read_config`.
    """
    module, settings = peer_called(peer)
    data, network, images = opened(run, allowed)
    if "float" not in known:
        known["float"] = evaluate(network, data.test_dataloader(), data.num_classes).accuracy
    rows = known.setdefault("rows", {}).setdefault(peer, {})
    made: dict[Quantize, tuple[Any, list[float]]] = {}
    gauge = [] if gauge is None else gauge
    for name, setting in settings.items():
        if name in rows or not re.search(only, name):
            continue
        if setting.quantize not in made:
            seconds: list[float] = []
            for turn in range(turns):
                if len(gauge) == turn:
                    _timed(partial(ours.quantized, network, images, 8, activation_bits=8), gauge)
                quantized = _timed(partial(setting.quantize, copied(network).eval(), images), seconds)
            made = {setting.quantize: (quantized, seconds)}
        quantized, seconds = made[setting.quantize]
        with tempfile.TemporaryDirectory() as folder:
            setting.write(quantized, Path(folder))
            files = {path.name: path.stat().st_size for path in sorted(Path(folder).rglob("*")) if path.is_file()}
            accuracy = evaluate(setting.read(Path(folder), network), data.test_dataloader(), data.num_classes).accuracy
        rows[name] = {
            "weights": setting.weights,
            "inputs": setting.inputs,
            "test_accuracy": accuracy,
            "files": files,
            "seconds": seconds,
            "gauge_seconds": [*gauge],
            "file": setting.file,
            "runs": setting.runs,
            "versions": {package: version(package) for package in module.PACKAGES},
            "processor": processor(),
        }
        save()


def _timed(work: Callable[[], Any], seconds: list[float]) -> Any:
    """What `work` gives; adds to `seconds` those of all threads on a CPU, which other processes hardly change."""
    started = time.process_time()
    result = work()
    seconds.append(time.process_time() - started)
    return result


def tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables for each network, one for each width of its weights; `results[stem]` is what `measure` made."""
    return "\n".join(_tables(stem, known) for stem, known in results.items())


def _tables(stem: str, known: Mapping[str, Any]) -> str:
    groups: dict[tuple[float, str], list[Sequence[str]]] = {}
    for peer, rows in known["rows"].items():
        for name, row in rows.items():
            # What runtimes compute on integers stands by itself.
            what = "Weights and inputs" if row["weights"] == row["inputs"] else "Weights"
            groups.setdefault((-row["weights"], what), []).append(_line(peer, name, row, known["float"]))
    text = f"{stem}, fp32 {100 * known['float']:.2f} % on the test set\n"
    for (weights, what), lines in sorted(groups.items(), key=lambda pair: pair[0]):
        text += f"\n{what} of {-weights:g} bits:\n\n{markdown_table(HEAD, lines)}\n"
    return text


def _line(peer: str, name: str, row: Mapping[str, Any], accuracy: float) -> Sequence[str]:
    ratios = [seconds / gauge for seconds, gauge in zip(row["seconds"], row["gauge_seconds"], strict=False)]
    return [
        peer,
        name,
        "float" if row["inputs"] is None else str(row["inputs"]),
        f"{100 * row['test_accuracy']:.2f}",
        f"{100 * (row['test_accuracy'] - accuracy):+.2f}",
        f"{sum(row['files'].values()) / 1000:,.1f}",
        f"{statistics.median(row['seconds']):.1f}",
        f"{statistics.median(ratios):.2f}" if ratios else "",
        f"{row['file']}: {row['runs']}",
    ]
