"""What happens to the best checkpoint when training is over: it is quantized, written, read back and measured."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import nn

from compress import models
from compress.export.formats import with_reference
from compress.export.state_dicts import BEST_NETWORK
from compress.models import masks
from compress.models.inference import full_float32
from compress.pipeline.parts import Parts
from compress.pipeline.variants import Variants
from compress.pipeline.weight_panels import weight_panels
from compress.progress import console
from compress.quantization.lsq import FakeQuantization, float_network
from compress.results.layer_pictures import Panel
from compress.results.loggers import log_tradeoff
from compress.results.surroundings import surroundings
from compress.training.fit import BEST, read_checkpoint


@dataclass(frozen=True)
class Measured:
    """The best network of a run and its variants, the float32 student first.

    `name` is the network's name in the method, `student` itself in float32, and `trained` as it was trained, on its
    grids perhaps.
    """

    name: str
    student: nn.Module
    trained: nn.Module
    variants: Variants

    def record(self, parts: Parts, threads: int | None = None, **about_student: Any) -> dict[str, Any]:
        """What `compress.results.record.Record` says of it; `threads` are those of the training, if any."""
        reference = self.variants.rows[0]
        per_class = zip(parts.data.class_names, self.variants.test.per_class, strict=True)
        role = "student" if self.name == "model" else "peer"
        student = {
            "model": parts.label(role),
            "own_class": models.names_class(parts.network_node(role)["stem"]),
            **about_student,
            "parameters": models.count_parameters(self.student),
            "macs": models.count_macs(self.student, parts.data.input_shape),
            "validation_accuracy": reference.validation_accuracy,
            "test_accuracy": reference.test_accuracy,
            "test_accuracy_per_class": dict(per_class) if parts.data.labelled else {},
            **(parts.published_weights if self.name == "model" else {}),
        }
        return {
            **surroundings(threads, parts.plain["trainer"]["precision"] if threads else None),
            "runtimes": {exporter.runtime: exporter.about() for exporter in with_reference(parts.exporters)},
            "configuration": parts.configuration,
            "seed": parts.plain["seed"],
            "data": parts.data.record(),
            "student": student,
            "rows": self.variants.rows,
            "layers": self.variants.layers,
            "comparisons": self.variants.comparisons,
            "latency": self.variants.latency,
        }

    def panels(self) -> dict[str, list[Panel]]:
        """The weights that `weights.png` draws."""
        return weight_panels(self.student, self.variants.data.input_shape, self.variants.quantized)


class PostTrainingQuantization(pl.Callback):
    """At the end of a fit calls `measure`, see `measure_best`, and hands the figures to every logger.

    A failure of `measure` fails the fit.
    """

    def __init__(self, measure: Callable[[], Measured]) -> None:
        self.measure = measure
        self.measured: Measured | None = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.measured is None and trainer.is_global_zero:
            self.measured = self.measure()
            log_tradeoff(trainer.loggers, self.measured.variants.rows, trainer.global_step)


def measure_best(parts: Parts, directory: Path, float_checkpoint: Path | None = None) -> Measured:
    """Measures the best checkpoint in `directory`/checkpoints and every quantized variant of it.

    A network that was trained on grids comes as the second row. The float32 student is then the one that it started
    from, or where there was none, its weights before they are rounded; `float_checkpoint`: see `Parts.float_start`.
    """
    quantizes = parts.quantizer or parts.fake_quantization
    console.print("quantizing the best checkpoint" if quantizes else "measuring the best checkpoint", style="bold")
    name, trained = best_network(parts, directory / "checkpoints" / BEST)
    student = trained
    if parts.fake_quantization is not None:
        start = parts.float_start(float_checkpoint)
        student = float_network(trained) if start is None else start.eval().to(parts.data.device)
    return measured(parts, directory, name, student, trained)


def measured(parts: Parts, directory: Path, name: str, student: nn.Module, trained: nn.Module) -> Measured:
    """Measures the network `name`, `student` in float32 and `trained` on the method's grids, and quantizes it."""
    own_network = parts.own_network(name)
    variants = Variants(parts.data, directory, parts.architectures[name], parts.exporters, own_network, parts.origin)
    with full_float32():
        variants.add_float(student)
        if parts.fake_quantization is not None:
            _add_trained(variants, parts, parts.fake_quantization, trained)
        if parts.quantizer is not None:
            variants.quantize(student, parts.quantizer)
        variants.finish()
    return Measured(name, student, trained, variants)


def best_network(parts: Parts, path: Path) -> tuple[str, nn.Module]:
    """Name and network of the best of those in a checkpoint, with its fake quantization if it was trained with one."""
    saved = read_checkpoint(path)
    name = saved[BEST_NETWORK]
    network = parts.rebuilt(name)
    if parts.fake_quantization is not None:
        network = parts.fake_quantization.prepare(network, parts.data.input_shape)
    prefix = f"{name}."
    state = {key.removeprefix(prefix): value for key, value in saved["state_dict"].items() if key.startswith(prefix)}
    masks.restore(network, state, path.name)
    network.load_state_dict(state)
    return name, network.eval().to(parts.data.device)


def _add_trained(variants: Variants, parts: Parts, grids: FakeQuantization, trained: nn.Module) -> None:
    baked = grids.bake(trained, parts.data.input_shape)
    inputs = f"a{grids.activation_bits}" if grids.activation_bits else ""
    if grids.weight_rate:
        word = f"{baked.rate:.3}bpw" + (f"-{inputs}" if inputs else "")
    else:
        word = (f"w{grids.weight_bits}" if grids.weight_bits else "") + inputs
    variants.add(
        f"student-lsq-{word}",
        baked,
        parts.data.calibration_batches(256),
        quantizer="lsq",
        bits=baked.rate if grids.weight_rate else grids.weight_bits or 32,
        levels=grids.weight_bits and 2**grids.weight_bits,
        first_last_bits=None if grids.weight_rate else grids.first_last_bits,
        activation_bits=grids.activation_bits or 32,
    )
