"""Variants of one network: each written, read back and measured; what comes out are the rows of the trade-off."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from compress import models
from compress.evaluation import Evaluation, evaluate, paired_latency_ms
from compress.export.packed import encoding, file_bytes, layer_bytes, read_model, write_float, write_packed
from compress.progress import bar, console
from compress.quantization import Measures, QuantizedModel, Quantizer
from compress.quantization.activations import input_quantizers
from compress.results.tradeoff import Row

# Batch sizes of the two latencies, and how often each is measured.
TIMED = {"latency_ms": (1, 20), "latency_32_ms": (32, 5)}


class Variants:
    """Collects `rows`, the float32 network first; see `compress.results.tradeoff` for what is measured.

    Files go to `directory`/models; with export["packed"] false they are measured and removed, with export["onnx"] true
    an ONNX file is written, measured and kept beside each. architecture: {"stem", "options", "num_classes"}.
    `layers` says for each packed file which layers were quantized, to how many bits and with which relative output
    error, and `quantized` has the networks by name; `test` is the evaluation of the float32 network, `student`, on the
    test set.
    """

    def __init__(
        self,
        data: pl.LightningDataModule,
        directory: Path,
        architecture: Mapping[str, Any],
        export: Mapping[str, bool],
    ) -> None:
        self.data, self.directory, self.export = data, directory, export
        self.rows: list[Row] = []
        self.layers: dict[str, dict[str, Any]] = {}
        self.quantized: dict[str, QuantizedModel] = {}
        self.student: nn.Module | None = None
        self.test: Evaluation | None = None
        self._runnable: list[Callable[[Tensor], Tensor]] = []
        self._description = describe(architecture, data)

    def add_float(self, student: nn.Module) -> None:
        """The reference of all others."""
        self.student = student
        path = self._path("student-fp32")
        write_float(path, student, **self._description)
        columns = {"quantizer": "none", "bits": 32, "levels": None, "first_last_bits": None, "activation_bits": 32}
        self._measure_packed(path, columns)
        if self.export["onnx"]:
            from compress.export.onnx import write_onnx_float

            path = path.with_suffix(".onnx")
            write_onnx_float(path, student, **self._description)
            self._measure_onnx(path, columns, self.test)

    def add(self, name: str, quantized: QuantizedModel, calibration: Iterable[Tensor], **columns: Any) -> None:
        """`quantized` as the file `name`; `columns` are those of its row that say how it was made."""
        path = self._path(name)
        write_packed(path, quantized, **self._description)
        inputs = {layer: grid.bits for layer, grid in input_quantizers(quantized.model).items()}
        self.layers[path.name] = {
            "quantized": {
                layer: {"bits": each.bits, "levels": each.grid.levels, "error": each.error, "encoding": encoding(each)}
                for layer, each in quantized.layers.items()
            },
            "skipped": dict(quantized.skipped),
        } | ({"input_bits": inputs} if inputs else {})
        self.quantized[name] = quantized
        test = self._measure_packed(path, columns)
        if self.export["onnx"]:
            from compress.export.onnx import write_onnx

            path = path.with_suffix(".onnx")
            write_onnx(path, quantized, **self._description, calibration_batches=calibration if inputs else ())
            self._measure_onnx(path, columns, test)

    def quantize(self, student: nn.Module, quantizer: Quantizer) -> None:
        """Every variant that `quantizer` makes of `student`."""
        batches = self.data.calibration_batches(quantizer.calibration_images)
        count = sum(len(batch) for batch in batches)
        started = time.perf_counter()
        with bar() as progress:
            task = progress.add_task("", total=None)

            def show(done: int, total: int, what: str) -> None:
                progress.update(task, completed=done, total=total, description=what)

            measures = Measures(self._bytes, layer_bytes, self._validation_accuracy, self.rows[0].bytes)
            for variant in quantizer.variants(student, batches, measures, show):
                quantized = variant.model
                seconds = time.perf_counter() - started
                skipped = f", left float: {', '.join(quantized.skipped)}" if quantized.skipped else ""
                console.print(
                    f"  {quantizer.name} {variant.label}: {len(quantized.layers)} layers on {count} images, "
                    f"{seconds:.1f} s{skipped}"
                )
                inputs = f"-a{quantizer.activation_bits}" if quantizer.activation_bits else ""
                self.add(
                    f"student-{quantizer.name}-{variant.label.replace(' ', '')}{inputs}",
                    quantized,
                    batches,
                    quantizer=quantizer.name,
                    bits=variant.bits,
                    levels=variant.levels,
                    first_last_bits=quantizer.first_last_bits,
                    activation_bits=quantizer.activation_bits or 32,
                )
                started = time.perf_counter()

    def finish(self) -> None:
        """Fills in the latencies, for which all variants take turns on one thread of the CPU."""
        for column, (batch, repeats) in TIMED.items():
            found = paired_latency_ms(self._runnable, self.data.input_shape, batch, repeats)
            pairs = zip(self.rows, found, strict=True)
            self.rows = [replace(row, **{column: milliseconds}) for row, milliseconds in pairs]
        self._runnable.clear()
        folder = self.directory / "models"
        if not any(folder.iterdir()):
            folder.rmdir()

    def _path(self, name: str) -> Path:
        return self.directory / "models" / f"{name}.safetensors"

    def _bytes(self, quantized: QuantizedModel) -> int:
        return file_bytes(quantized, **self._description)

    def _validation_accuracy(self, model: nn.Module) -> float:
        return evaluate(model, self.data.val_dataloader(), self.data.num_classes).accuracy

    def _measure_packed(self, path: Path, columns: Mapping[str, Any]) -> Evaluation:
        model = read_model(path)[0]
        size = path.stat().st_size
        if not self.export["packed"]:
            path.unlink()
        macs = models.count_macs(model, self.data.input_shape)
        test = self._measure(path, size, model.to(self.data.device), columns, sparsity(model), macs, "torch")
        self._runnable.append(model.cpu())
        return test

    def _measure_onnx(self, path: Path, columns: Mapping[str, Any], torch_test: Evaluation) -> None:
        from compress.export.onnx import OnnxModel

        model = OnnxModel.read(path, threads=torch.get_num_threads())
        last, size = self.rows[-1], path.stat().st_size
        self._measure(path, size, model, columns, last.sparsity, last.macs, "onnxruntime", torch_test)
        self._runnable.append(OnnxModel.read(path, threads=1))

    def _measure(
        self,
        path: Path,
        size: int,
        model: Callable[[Tensor], Tensor],
        columns: Mapping[str, Any],
        zeros: float,
        macs: int | None,
        runtime: str,
        torch_test: Evaluation | None = None,
    ) -> Evaluation:
        classes = self.data.num_classes
        validation = evaluate(model, self.data.val_dataloader(), classes)
        test = evaluate(model, self.data.test_dataloader(), classes)
        if self.test is None:
            self.test = test
        self.rows.append(
            Row(
                **columns,
                runtime=runtime,
                sparsity=zeros,
                macs=macs,
                validation_accuracy=validation.accuracy,
                test_accuracy=test.accuracy,
                agreement=test.agreement(self.test),
                runtime_agreement=None if torch_test is None else test.agreement(torch_test),
                logit_difference=None if torch_test is None else (test.logits - torch_test.logits).abs().max().item(),
                bytes=size,
                ratio=(self.rows[0].bytes if self.rows else size) / size,
                latency_ms=0.0,
                latency_32_ms=0.0,
                file=str(path.relative_to(self.directory)) if path.exists() else "",
            )
        )
        return test


def describe(architecture: Mapping[str, Any], data: pl.LightningDataModule) -> dict[str, Any]:
    """What a file says of a network of that `architecture` for those `data`: arguments of `write_packed`."""
    return {
        "architecture": architecture,
        "class_names": data.class_names,
        "mean": data.mean,
        "standard_deviation": data.standard_deviation,
        "input_shape": data.input_shape,
    }


def sparsity(model: nn.Module) -> float:
    """The share, 0..1, of exact zeros among the weights of the convolutions and linear layers."""
    weights = [each.weight for each in model.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
