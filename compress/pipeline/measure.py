"""The Lightning callback that quantizes and measures the best checkpoint when training is over."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from compress import models
from compress.export.weights import BEST_NETWORK
from compress.models import masks
from compress.pipeline.variants import Variants
from compress.progress import console
from compress.quantization import Quantizer
from compress.quantization.lsq import FakeQuantization, float_network
from compress.results.loggers import log_tradeoff
from compress.training.fit import BEST


class PostTrainingQuantization(pl.Callback):
    """At the end of a fit: `variants`, with the float32 student and what `quantizer` (or none) makes of it.

    A network that was trained `on_grids` comes as the second row. The float32 student is then the one that it started
    from, `start`, or where there was none, its weights before they are rounded.

    `architectures` has, for each network of the method, the mapping {stem, options, num_classes} that goes into the
    files; the one that the checkpoint calls its best is taken: `network` is its name, `student` itself in float32
    and `trained` as it was trained, on its grids perhaps.
    Metrics go to every logger as `tradeoff/<variant>/<name>`. `before` is called with "student" when training is over.
    `data`, `directory` and `export` are those of `compress.pipeline.variants.Variants`. A failure here fails the fit.
    """

    def __init__(
        self,
        data: pl.LightningDataModule,
        directory: Path,
        architectures: Mapping[str, Mapping[str, Any]],
        quantizer: Quantizer | None,
        export: Mapping[str, bool],
        on_grids: FakeQuantization | None = None,
        start: nn.Module | None = None,
        before: Callable[[str], None] = lambda part: None,
    ) -> None:
        self.data = data
        self.directory = directory
        self.quantizer = quantizer
        self.export = export
        self.on_grids = on_grids
        self.start = start
        self.architectures = architectures
        self.network = ""
        self.student: nn.Module | None = None
        self.trained: nn.Module | None = None
        self.before = before
        self.variants: Variants | None = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.variants is not None or not trainer.is_global_zero:
            return
        self.before("student")
        # Convolutions on recent GPUs would otherwise round to TF32, and the table promises float32.
        with torch.backends.cudnn.flags(allow_tf32=False):
            self._measure()
        log_tradeoff(trainer.loggers, self.variants.rows, trainer.global_step)

    def _measure(self) -> None:
        quantizes = self.quantizer or self.on_grids
        console.print("quantizing the best checkpoint" if quantizes else "measuring the best checkpoint", style="bold")
        best = self.trained = self._best()
        if self.on_grids is None:
            self.student = best
        else:
            self.student = float_network(best) if self.start is None else self.start.eval().to(self.data.device)
        variants = Variants(self.data, self.directory, self.architectures[self.network], self.export)
        variants.add_float(self.student)
        if self.on_grids is not None:
            self._add_trained(variants, best)
        if self.quantizer is not None:
            variants.quantize(self.student, self.quantizer)
        variants.finish()
        self.variants = variants

    def _add_trained(self, variants: Variants, prepared: nn.Module) -> None:
        grids = self.on_grids
        widths = "".join(
            f"{letter}{bits}" for letter, bits in (("w", grids.weight_bits), ("a", grids.activation_bits)) if bits
        )
        variants.add(
            f"student-lsq-{widths}",
            grids.bake(prepared),
            self.data.calibration_batches(256),
            quantizer="lsq",
            bits=grids.weight_bits or 32,
            levels=grids.weight_bits and 2**grids.weight_bits,
            first_last_bits=grids.first_last_bits,
            activation_bits=grids.activation_bits or 32,
        )

    def _best(self) -> nn.Module:
        """The best network of the best checkpoint, with its fake quantization if it was trained with one."""
        saved = torch.load(self.directory / "checkpoints" / BEST, map_location="cpu", weights_only=True)
        self.network = saved[BEST_NETWORK]
        architecture = self.architectures[self.network]
        student = models.rebuild(architecture)
        if self.on_grids is not None:
            student = self.on_grids.prepare(student)
        prefix = f"{self.network}."
        state = {
            name.removeprefix(prefix): value for name, value in saved["state_dict"].items() if name.startswith(prefix)
        }
        masks.restore(student, state, BEST)
        student.load_state_dict(state)
        return student.eval().to(self.data.device)
