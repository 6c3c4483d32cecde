"""The model card of a run: `README.md` beside its models, of what was measured and of nothing else.

Its first lines are the metadata of the Hugging Face Hub (huggingface.co/docs/hub/model-cards); the rest is Markdown.
"""

import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from compress.errors import UserError, printable
from compress.export.exporter import Exporter
from compress.export.formats import exporter_of
from compress.results.markdown import escaped, markdown_table
from compress.results.record import Network, Record
from compress.results.tradeoff import Row, columns_of, figures, meanings

FILE = "README.md"
TABLE = "page"  # whose columns the card has
TELLING = ("amx", "bf16", "fp16", "neon", "sve", "vnni")  # what of a processor decides which numbers are the fastest
UNKNOWN = "not known"


def model_card(record: Record, digests: Mapping[str, str], licence: str | None = None) -> str:
    """The card of those rows of `record` whose files are in `digests`, which has the SHA-256 of all, and of the first.

    The float32 student comes first, because the others are compared with it, even where it has no file. licence: that
    of the weights by its name on the Hub; without one the metadata name none.
    """
    rows = [row for row in record.rows if row is record.rows[0] or row.file in digests]
    sections = [
        _metadata(record, rows, digests, licence),
        f"# {escaped(record.student.model)} for {escaped(record.data.name)}",
        _introduction(record),
        f"## Variants\n\n{_variants(rows, digests)}\n\n{_conditions(record, rows)}",
        f"## Use\n\n{_use(record, rows, digests)}",
        f"## How it was made\n\n{_origin(record)}",
        f"## Licences\n\n{_licences(record, licence)}",
        f"## Checksums\n\n{_checksums(digests)}",
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(record: Record, rows: list[Row], digests: Mapping[str, str], licence: str | None) -> str:
    about: dict[str, Any] = {
        "license": licence,
        "library_name": "compress",
        "pipeline_tag": "image-classification",
        "tags": sorted({"image-classification", *(row.runtime for row in rows), *_techniques(record, rows)}),
        "datasets": [record.data.hub_name] if record.data.hub_name else None,
    }
    measured = [row for row in rows if row.test_accuracy is not None and row.file in digests]
    if measured:
        about["metrics"] = ["accuracy"]
        name = record.data.name
        data = {"name": name, "type": record.data.hub_name or name.lower(), "split": "test"}
        metrics = [
            {"type": "accuracy", "value": row.test_accuracy, "name": f"accuracy, {row.name}"} for row in measured
        ]
        result = {"task": {"type": "image-classification"}, "dataset": data, "metrics": metrics}
        about["model-index"] = [{"name": record.student.model, "results": [result]}]
    present = {key: value for key, value in about.items() if value is not None}
    return f"---\n{yaml.safe_dump(present, sort_keys=False, allow_unicode=True)}---"


def _techniques(record: Record, rows: list[Row]) -> set[str]:
    quantized = any(row.quantizer != "none" for row in rows)
    found = {"quantization": quantized, "pruning": record.pruning, "distillation": record.teacher}
    return {name for name, present in found.items() if present}


def _introduction(record: Record) -> str:
    network, data = record.student, record.data
    channels, *size = data.input_shape or [3]
    image = f"images of {size[0]}x{size[1]} pixels and {channels} channels" if size else "images"
    names = ", ".join(map(escaped, data.class_names))
    classes = f" into {len(data.class_names)} classes: {names}" if data.class_names else ""
    costs = {"parameters": network.parameters, "multiply-accumulates an image": network.macs}
    cost = " and ".join(f"{count:,} {what}" for what, count in costs.items() if count is not None)
    return f"It classifies {image}{classes}." + (f" It has {cost}." if cost else "")


def _variants(rows: list[Row], digests: Mapping[str, str]) -> str:
    """A table of the rows; columns without any value are left out."""
    reference = rows[0]
    values = [figures(TABLE, partial(getattr, row), partial(getattr, reference)) for row in rows]
    columns = {
        key: column for key, column in columns_of(TABLE).items() if any(of_row[key] is not None for of_row in values)
    }
    lines = []
    for row, of_row in zip(rows, values, strict=True):
        link = f"[{escaped(Path(row.file).name)}]({quote(row.file)})" if row.file in digests else ""
        lines.append([escaped(row.name), *(column.printed(of_row[key]) for key, column in columns.items()), link])
    head = ["variant", *(column.heading for column in columns.values()), "file"]
    return f"{markdown_table(head, lines)}\n\n{meanings(columns.values())}"


def _conditions(record: Record, rows: list[Row]) -> str:
    """Of accuracies the images, of latencies the processor and the runtimes."""
    images, hardware = record.data.images, record.hardware
    counts = [f"{images[split]:,} {split} images" for split in ("validation", "test") if split in images]
    measured = f"Accuracies are of {' and '.join(counts)}. " if counts and rows[0].test_accuracy is not None else ""
    features = ", ".join(name for name in hardware.features if any(part in name for part in TELLING))
    parts = []
    for runtime in dict.fromkeys(row.runtime for row in rows):
        about = record.runtimes.get(runtime)
        version = f" {about.version}" if about and about.version else ""
        precision = f" (floats in {about.latency_precision})" if about and about.latency_precision else ""
        parts.append(f"{runtime}{version}{precision}")
    where = (hardware.processor or "a processor that is not known") + (f" ({features})" if features else "")
    said = f"{measured}Latencies are of one thread of {escaped(where)}, in {escaped(', '.join(parts))}."
    return said + _promise(record)


def _promise(record: Record) -> str:
    """What became of the latency that was asked for, and the layers that it left float."""
    latency = record.latency
    if latency is None:
        return ""
    kept = "which it keeps" if latency.kept else "which it does not keep"
    reasons = {name: reason for file in record.layers.values() for name, reason in file.skipped.items()}
    floats = [name for name, reason in reasons.items() if reason.startswith("latency:")]
    layers = f" Float for it: {escaped(', '.join(floats))}." if floats else ""
    return (
        f"\n\nAsked for was {escaped(latency.wanted)}, at most {latency.limit_ms:.3g} ms for an image in "
        f"{latency.runtime}, {kept} with {latency.measured_ms:.3g} ms.{layers}"
    )


def _use(record: Record, rows: list[Row], digests: Mapping[str, str]) -> str:
    """A picture on the command line, and a few lines of Python for each runtime."""
    present = [row for row in rows if row.file in digests]
    if not present:
        return "The run kept no model files."
    statistics = (record.data.mean, record.data.standard_deviation)
    mean, deviation = (" ".join(f"{value:.6g}" for value in values) for values in statistics)
    own = record.student.model if record.student.own_class else ""
    words = [present[-1].file, "picture.png"]
    exporter = _exporter(present[-1].file)
    if own and exporter is not None and exporter.takes_network:
        words.append(f"network={own}")
    parts = [
        "In a clone of compress, with the path of this folder before that of the file:",
        f"    python scripts/predict.py {shlex.join(words)}",
    ]
    parts.append(
        "In Python, `images` are a NumPy array of float32, (images, channels, height, width), in 0..1 and normalised: "
        f"less the means {mean} of the channels and divided by their deviations {deviation}."
    )
    for runtime in dict.fromkeys(row.runtime for row in present):
        file = next(row.file for row in reversed(present) if row.runtime == runtime)
        if lines := _loading(file, own):
            parts.append(f"{runtime}:\n\n```python\n{lines}\n```")
    return "\n\n".join(parts)


def _loading(file: str, own: str) -> str:
    """Lines of Python that load a file; none where its format is not to be found now.

    own: the class of the network, where it is the user's; empty otherwise.
    """
    exporter = _exporter(file)
    if exporter is None:
        return ""
    loading, (module, _, name) = exporter.loading, own.rpartition(".")
    if not (exporter.takes_network and name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        return loading.format(file=repr(file), network="")
    return f"from {module} import {name}\n" + loading.format(file=repr(file), network=f", network={name}")


def _exporter(file: str) -> Exporter | None:
    """That of the file; None where its format is one of the user's own that is not to be found now."""
    try:
        return exporter_of(Path(file))
    except UserError:
        return None


def _origin(record: Record) -> str:
    student, teacher, pruning = record.student, record.teacher, record.pruning
    method = f"method: {record.method}" if record.method else "quantized as it was found, not trained"
    lines = [] if record.stages else [method]
    if teacher is not None:
        lines.append(f"teacher: {_described(teacher)}")
    if student.epochs:
        lines.append(f"epochs: {student.epochs}, the best for validation was {student.best_epoch}")
    if pruning is not None:
        sparsity = f", {pruning.sparsity:.1%} of the weights under its masks at zero" if pruning.sparsity else ""
        lines.append(f"pruning: {pruning.recipe}{sparsity}")
    lines += [f"stage {stage.name}: {' '.join(stage.overrides) or 'as it is'}" for stage in record.stages]
    lines.append(f"seed: {record.seed}")
    versions = [f"{name} {value}" for name, value in record.versions.items() if value]
    lines += [f"versions: {', '.join(versions)}"] if versions else []
    lines += [f"configuration: SHA-256 {record.configuration}"] if record.configuration else []
    typed = "\n".join(f"    {printable(word)}" for word in (" ".join(map(shlex.quote, record.overrides)),) if word)
    command = f"\n\nWhat was typed:\n\n{typed}" if typed else ""
    return "\n".join(f"- {escaped(line)}" for line in lines) + command


def _described(network: Network) -> str:
    accuracy = network.test_accuracy
    return network.model if accuracy is None else f"{network.model}, right for {accuracy:.2%} of the test images"


def _licences(record: Record, licence: str | None) -> str:
    student, data = record.student, record.data
    lines = [f"these weights: {licence or UNKNOWN}"]
    if student.weights:
        lines.append(f"the weights that they began as, {student.weights}: {student.licence or UNKNOWN}")
    lines.append(f"the images, {data.name}: {data.licence or UNKNOWN}")
    return "\n".join(f"- {escaped(line)}" for line in lines)


def _checksums(digests: Mapping[str, str]) -> str:
    lines = [[escaped(file), digest] for file, digest in digests.items()]
    return markdown_table(["file", "SHA-256"], lines) if lines else "There are no files."
