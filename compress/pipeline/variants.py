"""Variants of one network: each written, read back and measured; what comes out are the rows of the trade-off."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import models
from compress.data.module import DataModule
from compress.errors import UserError
from compress.evaluation import Evaluation, evaluate, paired_latency_ms
from compress.export.description import describe
from compress.export.encodings import encoding
from compress.export.exporter import Exporter
from compress.export.formats import REFERENCE, read_back, with_reference
from compress.export.packed import file_bytes
from compress.models.baking import copied
from compress.models.canonical import LAYERS, difference
from compress.models.outputs import logits
from compress.pipeline.latency import runtime_of
from compress.progress import bar, console
from compress.quantization import Measures, QuantizedModel, Quantizer
from compress.quantization.activations import input_quantizers
from compress.quantization.comparisons import compare
from compress.quantization.latency import limit_ms
from compress.results.record import Latency
from compress.results.tradeoff import Row

# Batch sizes of the two latencies, and how often each is measured.
NAMED = 0.02  # share of the weights; where more stay float, the layers are named
COMPARED = 32  # calibration images that a file is read back for
TIMED = {"latency_ms": (1, 20), "latency_32_ms": (32, 5)}


class Variants:
    """Collects `rows`, the float32 network first; see `compress.results.tradeoff` for what is measured.

    Every network gets a file of each of the `exporters` in `directory`/models, and a row for each file. The reference
    format comes first, because the other rows are compared with its row; its files are removed again where it is not
    among the `exporters`. architecture: {"stem", "options", "num_classes"}; own_network: one of the user's own class,
    which reading a file takes; origin: what its files say of where they come from.
    `layers` says for each reference file which layers were quantized, to how many bits and with which relative output
    error, `quantized` has the networks by name, and `latency` says whether one that was asked for is kept; `test` is
    the evaluation of the float32 network on the test set.
    """

    def __init__(
        self,
        data: DataModule,
        directory: Path,
        architecture: Mapping[str, Any],
        exporters: Sequence[Exporter],
        own_network: nn.Module | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.data, self.directory, self.exporters = data, directory, list(exporters)
        self.own_network = own_network
        self.rows: list[Row] = []
        self.layers: dict[str, dict[str, Any]] = {}
        self.quantized: dict[str, QuantizedModel] = {}
        self.comparisons: dict[str, Any] = {"read_back": {}}
        self.test: Evaluation
        self.latency: Latency | None = None
        self._promise: tuple[str, str, Mapping[str, float]] | None = None
        self._runnable: list[Callable[[Tensor], Tensor]] = []
        self._description = describe(architecture, data, origin)

    def add_float(self, student: nn.Module) -> None:
        """The reference of all others. Images without labels get those that it gives them."""
        if not self.data.labelled:
            self.data.label(student)
        columns = {"quantizer": "none", "bits": 32, "levels": None, "first_last_bits": None, "activation_bits": 32}
        self._measure("student-fp32", student, (), columns)

    def add(self, name: str, quantized: QuantizedModel, calibration: Iterable[Tensor], **columns: Any) -> None:
        """`quantized` as the files `name`; `columns` are those of its rows that say how it was made."""
        inputs = {layer: grid.bits for layer, grid in input_quantizers(quantized.model).items()}
        self.layers[f"{name}{REFERENCE.suffix}"] = {
            "quantized": {
                layer_name: {
                    "bits": layer.bits,
                    "levels": layer.grid.levels,
                    "error": layer.error,
                    "encoding": encoding(layer),
                }
                | ({} if layer.sensitivity is None else {"sensitivity": layer.sensitivity})
                for layer_name, layer in quantized.layers.items()
            },
            "skipped": dict(quantized.skipped),
        } | ({"input_bits": inputs} if inputs else {})
        self.quantized[name] = quantized
        self._measure(name, quantized, calibration, columns)

    def quantize(self, student: nn.Module, quantizer: Quantizer) -> None:
        """Every variant that `quantizer` makes of `student`."""
        batches = self.data.calibration_batches(quantizer.calibration_images)
        count = sum(len(batch) for batch in batches)
        tuning = self.data.calibration_batches(quantizer.tune.images) if quantizer.tune else []
        started = time.perf_counter()
        with bar() as progress:
            task = progress.add_task("", total=None)

            def show(done: int, total: int, what: str) -> None:
                progress.update(task, completed=done, total=total, description=what)

            timed = quantizer.latency and runtime_of(self.exporters, self._description, batches[0])
            measures = Measures(self._bytes, self.rows[0].bytes, self._validation_accuracy, timed or None)
            self.comparisons |= compare(student, batches, quantizer.skip)
            for variant in quantizer.variants(student, batches, measures, show, tuning):
                quantized = variant.model
                seconds = time.perf_counter() - started
                share = quantized.float_share
                left = (
                    f", left float: {share:.0%} of the weights ({', '.join(quantized.skipped)})"
                    if share > NAMED
                    else ""
                )
                console.print(
                    f"  {quantizer.name} {variant.label}: {len(quantized.layers)} layers on {count} images, "
                    f"{f'tuned on {sum(map(len, tuning))}, ' if tuning else ''}{seconds:.1f} s{left}"
                )
                inputs = f"-a{quantizer.activation_bits}" if quantizer.activation_bits else ""
                self.add(
                    f"student-{quantizer.name}-{variant.word}{inputs}",
                    quantized,
                    batches,
                    quantizer=quantizer.name,
                    bits=variant.bits,
                    levels=variant.levels,
                    first_last_bits=None if variant.levels is None else quantizer.first_last_bits,
                    activation_bits=quantizer.activation_bits or 32,
                )
                if timed and variant.saved_ms is not None:
                    self._promise = (timed.name, str(quantizer.latency), variant.saved_ms)
                started = time.perf_counter()

    def finish(self) -> None:
        """Fills in the latencies, for which all variants of a runtime take turns on one thread of the CPU."""
        for runtime in dict.fromkeys(row.runtime for row in self.rows):
            places = [place for place, row in enumerate(self.rows) if row.runtime == runtime]
            models = [self._runnable[place] for place in places]
            for column, (batch, repeats) in TIMED.items():
                medians = paired_latency_ms(models, self.data.input_shape, batch, repeats)
                pairs: Iterable[tuple[int, Any]] = zip(places, medians, strict=True)
                for place, milliseconds in pairs:
                    self.rows[place] = replace(self.rows[place], **{column: milliseconds})
        floats = {row.runtime: row for row in self.rows if row.quantizer == "none"}
        self.rows = [
            replace(
                row,
                speedup=floats[row.runtime].latency_ms / row.latency_ms,
                speedup_32=floats[row.runtime].latency_32_ms / row.latency_32_ms,
            )
            if row.quantizer != "none" and row.runtime != REFERENCE.runtime
            else row
            for row in self.rows
        ]
        if self._promise is not None:
            self.latency = self._latency(*self._promise, floats)
        self._runnable.clear()
        folder = self.directory / "models"
        if not any(folder.iterdir()):
            folder.rmdir()

    def _latency(self, runtime: str, wanted: str, saved_ms: Mapping[str, float], floats: Mapping[str, Row]) -> Latency:
        """What became of the latency that was `wanted`; says it where the file does not keep it."""
        row = next(row for row in reversed(self.rows) if row.runtime == runtime)
        limit = limit_ms(wanted, floats[runtime].latency_ms)
        kept = row.latency_ms <= limit
        if not kept:
            console.print(
                f"note: quantizer.latency: {wanted} was not kept: {row.latency_ms:.3g} ms in {runtime}, where "
                f"{limit:.3g} ms were asked for"
            )
        return Latency(
            runtime=runtime,
            wanted=wanted,
            limit_ms=limit,
            measured_ms=row.latency_ms,
            kept=kept,
            saved_ms=dict(saved_ms),
        )

    def _bytes(self, quantized: QuantizedModel) -> int:
        return file_bytes(quantized, self._description)

    def _validation_accuracy(self, model: nn.Module) -> float:
        return evaluate(model, self.data.val_dataloader(), self.data.num_classes).accuracy

    def _measure(
        self,
        name: str,
        network: nn.Module | QuantizedModel,
        calibration: Iterable[Tensor],
        columns: Mapping[str, Any],
    ) -> None:
        """Writes `network` in every format, reads it back and adds the rows."""
        reference = None
        for exporter in with_reference(self.exporters):
            path = self.directory / "models" / f"{name}{exporter.suffix}"
            exporter.write(path, network, self._description, calibration)
            model, _ = read_back(exporter, path, torch.get_num_threads(), self.own_network)
            self._compare(path.name, exporter, network, model)
            if reference is None:
                macs = models.count_macs(model, self.data.input_shape)
                columns = {**columns, "macs": macs, "sparsity": sparsity(model)}
            placed = model.to(self.data.device) if exporter.movable else on_cpu(model)
            test = self._add_row(path, exporter, placed, reference, columns)
            reference = reference or test
            self._runnable.append(model.cpu() if exporter.movable else exporter.read_for_latency(path))
            if exporter not in self.exporters:
                path.unlink()

    def _compare(
        self, file: str, exporter: Exporter, network: nn.Module | QuantizedModel, model: Callable[[Tensor], Tensor]
    ) -> None:
        """Records how far the `model` read from a file is from the `network` in memory; UserError where too far."""
        written = network.model if isinstance(network, QuantizedModel) else network
        [images, *_] = self.data.calibration_batches(COMPARED)
        with torch.no_grad():
            expected = logits(copied(written).eval().cpu()(images.cpu()))
            found = difference(model(images.cpu()), expected)
        # On integers a value that lies between two codes can fall either way.
        limit = 1e-4 if exporter is REFERENCE else 0.5 if input_quantizers(written) else 1e-2
        if found > limit:
            raise UserError(
                f"{file}: found logits {found:.2g} off those of the network that was written; accepted: up to {limit:g}"
            )
        self.comparisons["read_back"][file] = found

    def _add_row(
        self,
        path: Path,
        exporter: Exporter,
        model: Callable[[Tensor], Tensor],
        reference: Evaluation | None,
        columns: Mapping[str, Any],
    ) -> Evaluation:
        """Adds the row of the `model` read from `path`; returns its evaluation on the test set, as `reference` is."""
        validation = evaluate(model, self.data.val_dataloader(), self.data.num_classes)
        test = evaluate(model, self.data.test_dataloader(), self.data.num_classes)
        if not self.rows:
            self.test = test
        size = path.stat().st_size
        self.rows.append(
            Row(
                **columns,
                runtime=exporter.runtime,
                validation_accuracy=validation.accuracy if self.data.labelled else None,
                test_accuracy=test.accuracy if self.data.labelled else None,
                agreement=test.agreement(self.test),
                runtime_agreement=None if reference is None else test.agreement(reference),
                logit_difference=None if reference is None else (test.logits - reference.logits).abs().max().item(),
                bytes=size,
                ratio=(self.rows[0].bytes if self.rows else size) / size,
                latency_ms=0.0,
                latency_32_ms=0.0,
                file=str(path.relative_to(self.directory)) if exporter in self.exporters else "",
            )
        )
        return test


def on_cpu(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`model` for images from every device."""
    return lambda images: model(images.cpu())


def sparsity(model: nn.Module) -> float:
    """The share, 0..1, of exact zeros among the weights of the convolutions and linear layers."""
    weights = [module.weight for module in model.modules() if isinstance(module, LAYERS)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
