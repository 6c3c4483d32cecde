"""The Lightning callback that quantizes and measures the best checkpoint when training is over."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from compress import models
from compress.evaluation import Evaluation, evaluate, latency_ms
from compress.export.packed import read_model, write_float, write_packed
from compress.methods.classifier import BEST_NETWORK
from compress.progress import bar, console
from compress.quantization import QuantizedModel, Quantizer
from compress.quantization.activations import input_quantizers
from compress.quantization.lsq import FakeQuantization, float_network
from compress.results.tradeoff import Row
from compress.training import BEST


class PostTrainingQuantization(pl.Callback):
    """At the end of a fit: `rows`, the float32 student first, then one row per bit width of `quantizer` (or none).

    A network that was trained `on_grids` comes as the second row. The float32 student is then the one that it started
    from, `start`, or where there was none, its weights before they are rounded.

    Every variant is written to `directory/models`, read back, and what was read back is evaluated on the validation
    and test loaders of `data`; `test` holds the float32 student's test evaluation, and `layers` says for each packed
    file which layers were quantized, to how many bits and with which relative output error. `architectures` has,
    for each network of the method, the mapping {stem, options, num_classes} that goes into the files; the one that the
    checkpoint calls its best is taken: `network` is its name and `student` itself in float32. Metrics go to every
    logger as `tradeoff/<variant>/<name>`. `before` is called with "student" when training is over. A failure here
    fails the fit.
    """

    def __init__(
        self,
        data: pl.LightningDataModule,
        directory: Path,
        architectures: dict[str, dict[str, Any]],
        quantizer: Quantizer | None,
        on_grids: FakeQuantization | None = None,
        start: nn.Module | None = None,
        before: Callable[[str], None] = lambda part: None,
    ) -> None:
        self.data = data
        self.directory = directory
        self.quantizer = quantizer
        self.on_grids = on_grids
        self.start = start
        self.architectures = architectures
        self.network = ""
        self.student: nn.Module | None = None
        self.before = before
        self.rows: list[Row] = []
        self.layers: dict[str, dict[str, Any]] = {}
        self.test: Evaluation | None = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.rows or not trainer.is_global_zero:
            return
        self.before("student")
        # Convolutions on recent GPUs would otherwise round to TF32, and the table promises float32.
        with torch.backends.cudnn.flags(allow_tf32=False):
            self._measure(trainer)

    def _measure(self, trainer: pl.Trainer) -> None:
        console.print(
            "quantizing the best checkpoint" if self.quantizer or self.on_grids else "measuring the best checkpoint",
            style="bold",
        )
        best = self._best()
        if self.on_grids is None:
            self.student = best
        else:
            self.student = float_network(best) if self.start is None else self.start.eval().to(self.data.device)
        path = self.directory / "models" / "student-fp32.safetensors"
        write_float(path, self.student, **self._description())
        self._add(path, quantizer="none", bits=32, levels=None, first_last_bits=None)
        if self.on_grids is not None:
            self._add_trained(best)
        if self.quantizer is not None:
            self._quantize(self.student)
        self._log(trainer.loggers, trainer.global_step)

    def _add_trained(self, prepared: nn.Module) -> None:
        grids = self.on_grids
        widths = "".join(
            f"{letter}{bits}" for letter, bits in (("w", grids.weight_bits), ("a", grids.activation_bits)) if bits
        )
        self._write(
            self.directory / "models" / f"student-lsq-{widths}.safetensors",
            grids.bake(prepared),
            quantizer="lsq",
            bits=grids.weight_bits or 32,
            levels=grids.weight_bits and 2**grids.weight_bits,
            first_last_bits=grids.first_last_bits,
            activation_bits=grids.activation_bits or 32,
        )

    def _quantize(self, student: nn.Module) -> None:
        quantizer = self.quantizer
        batches = self.data.calibration_batches(quantizer.calibration_images)
        with bar() as progress:
            for bits in quantizer.bits:
                task = progress.add_task("", total=None)

                def show(done: int, total: int, layer: str, bits: int, task: int = task) -> None:
                    progress.update(task, completed=done, total=total, description=f"{bits} bit  {layer}")

                started = time.perf_counter()
                quantized = quantizer(student, batches, bits, progress=show)
                seconds = time.perf_counter() - started
                progress.remove_task(task)
                count = sum(len(batch) for batch in batches)
                console.print(
                    f"  {quantizer.name} {bits} bit: {len(quantized.layers)} layers on {count} images, {seconds:.1f} s"
                    + (f", left float: {', '.join(quantized.skipped)}" if quantized.skipped else "")
                )
                inputs = f"-a{quantizer.activation_bits}" if quantizer.activation_bits else ""
                path = self.directory / "models" / f"student-{quantizer.name}-{bits}bit{inputs}.safetensors"
                self._write(
                    path,
                    quantized,
                    quantizer=quantizer.name,
                    bits=bits,
                    levels=quantizer.levels(bits),
                    first_last_bits=quantizer.first_last_bits,
                    activation_bits=quantizer.activation_bits or 32,
                )

    def _write(self, path: Path, quantized: QuantizedModel, **columns: Any) -> None:
        write_packed(path, quantized, **self._description())
        inputs = {name: grid.bits for name, grid in input_quantizers(quantized.model).items()}
        self.layers[path.name] = {
            "quantized": {
                name: {"bits": layer.bits, "levels": layer.grid.levels, "error": layer.error}
                for name, layer in quantized.layers.items()
            },
            "skipped": dict(quantized.skipped),
        } | ({"input_bits": inputs} if inputs else {})
        self._add(path, **columns)

    def _best(self) -> nn.Module:
        """The best network of the best checkpoint, with its fake quantization if it was trained with one."""
        saved = torch.load(self.directory / "checkpoints" / BEST, map_location="cpu", weights_only=True)
        self.network = saved[BEST_NETWORK]
        architecture = self.architectures[self.network]
        student = models.build(architecture["stem"], architecture["num_classes"], **architecture["options"])
        if self.on_grids is not None:
            student = self.on_grids.prepare(student)
        prefix = f"{self.network}."
        state = {
            name.removeprefix(prefix): value for name, value in saved["state_dict"].items() if name.startswith(prefix)
        }
        student.load_state_dict(state)
        return student.eval().to(self.data.device)

    def _description(self) -> dict[str, Any]:
        """What a file says of its model, so that it can be used without anything else."""
        data = self.data
        return {
            "architecture": self.architectures[self.network],
            "class_names": data.class_names,
            "mean": data.mean,
            "standard_deviation": data.standard_deviation,
            "input_shape": data.input_shape,
        }

    def _add(self, path: Path, *, activation_bits: int = 32, **columns: Any) -> None:
        model = read_model(path)[0].to(self.data.device)
        validation = evaluate(model, self.data.val_dataloader(), self.data.num_classes)
        test = evaluate(model, self.data.test_dataloader(), self.data.num_classes)
        if self.test is None:
            self.test = test
        size = path.stat().st_size
        self.rows.append(
            Row(
                **columns,
                activation_bits=activation_bits,
                sparsity=_sparsity(model),
                validation_accuracy=validation.accuracy,
                test_accuracy=test.accuracy,
                agreement=test.agreement(self.test),
                bytes=size,
                ratio=(self.rows[0].bytes if self.rows else size) / size,
                latency_ms=latency_ms(model, self.data.input_shape),
                file=str(path.relative_to(self.directory)),
            )
        )

    def _log(self, loggers: Sequence[Any], step: int) -> None:
        metrics = {
            f"tradeoff/{row.name.replace(' ', '_')}/{name}": float(getattr(row, name))
            for row in self.rows
            for name in ("validation_accuracy", "test_accuracy", "agreement", "bytes", "ratio")
        }
        for logger in loggers:
            logger.log_metrics(metrics, step=step)
            logger.save()


def _sparsity(model: nn.Module) -> float:
    weights = [each.weight for each in model.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
