"""`--dry-run`: models, sizes and an estimate of the time, from two timed steps and without training anything."""

import time
from collections.abc import Callable
from functools import partial

import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import nn

from compress import models
from compress.config.compose import Job
from compress.data.shared import DataSets
from compress.export.packed import file_bytes
from compress.pipeline.check import limited
from compress.pipeline.parts import Parts
from compress.pipeline.teacher_cache import cached_views
from compress.pipeline.teachers import cache_path
from compress.progress import console
from compress.quantization import QuantizedModel
from compress.quantization.rate_search import budget_bytes


def show(job: Job, data_sets: DataSets) -> None:
    """Prints what the checked `job` would build and about how long it would take on this machine."""
    parts = Parts(job.config, data_sets, networks=job.networks)
    student = parts.pruned_student.to(parts.device)
    title = escape(f"dry run: {' '.join(job.overrides) or 'defaults'}")
    printed = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("", "network", "parameters", "MACs/image", "fp32 kB"):
        printed.add_column(heading, justify="left" if heading in ("", "network") else "right")
    minutes, teacher_seconds = _teacher(parts, printed)
    _add(printed, "student", parts.label("student"), student, parts.data.input_shape)
    console.print(printed)

    batch, epochs = _batch(parts, parts.plain["data"]["batch_size"]), parts.plain["trainer"]["max_epochs"]
    step = _seconds(lambda: _step(student, batch, parts.data.input_shape))
    batches = limited(len(parts.data.train_dataloader()), parts.plain["trainer"].get("limit_train_batches"))
    answered = min(epochs, cached_views(parts) or epochs)
    minutes["student"] = batches * (epochs * step + answered * teacher_seconds) / 60
    sizes = _sizes(parts, student)
    if sizes:
        console.print(
            "packed files, about: " + ", ".join(f"{name} {size / 1000:,.1f} kB" for name, size in sizes.items())
        )
    total = sum(minutes.values())
    unit, length = ("minutes", 1) if total >= 1 else ("seconds", 60)
    shares = ", ".join(f"{part} {length * value:.1f}" for part, value in minutes.items())
    console.print(
        f"training, about {length * total:.1f} {unit} on this machine ({shares}), and the quantization after it"
    )


def _teacher(parts: Parts, printed: Table) -> tuple[dict[str, float], float]:
    """Minutes that training the teacher takes, if it has to be trained, and seconds of its part in a student's step."""
    minutes: dict[str, float] = {}
    seconds = 0.0
    batch, input_shape = _batch(parts, parts.plain["data"]["batch_size"]), parts.data.input_shape
    # What a student's step needs of the teacher.
    work = _step if parts.updates_teacher else _forward
    for key in parts.teacher_keys:
        node = parts.node(key)
        network = parts.teacher_network(key).to(parts.device)
        _add(printed, "teacher", parts.label(key), network, input_shape)
        seconds += _seconds(partial(work, network, batch, input_shape))
        if parts.trains_teacher(key) and not cache_path(parts, key).exists():
            training = node["training"]
            together = _batch(parts, training["batch_size"])
            step = _seconds(partial(_step, network, together, input_shape))
            steps = training["epochs"] * parts.data.record()["images"]["train"] / together
            minutes["teacher"] = minutes.get("teacher", 0.0) + steps * step / 60
    return minutes, seconds


def _batch(parts: Parts, batch_size: int) -> int:
    """The images of the largest batch."""
    return min(batch_size, len(parts.data.splits["train"]))


def _sizes(parts: Parts, student: nn.Module) -> dict[str, int]:
    """About how many bytes the packed files will have, by variant.

    They depend on how the codes are spread, which training changes little.
    """
    description = parts.description(student)
    sizes = {}
    grids = parts.fake_quantization
    if grids is not None:
        input_shape = parts.data.input_shape
        baked = grids.bake(grids.prepare(student, input_shape), input_shape)
        # Training is what leads to a rate.
        rate = baked.rate if grids.weight_rate is None else grids.weight_rate
        sizes["lsq"] = _size_at(rate, baked, file_bytes(baked, description))
    quantizer = parts.quantizer
    # What a drop allows is not known before the training, and which layers a latency leaves in float takes a while.
    if quantizer is None or quantizer.max_drop is not None or quantizer.latency is not None:
        return sizes
    if quantizer.budget is not None:
        return sizes | {"budget": budget_bytes(quantizer.budget, file_bytes(student, description))}
    # A few images will do, and whatever the options do for the accuracy.
    quantizer, batches = quantizer.roughly(), parts.data.calibration_batches(parts.data.num_classes)
    for width in quantizer.widths:
        sizes[f"{width} bit"] = file_bytes(quantizer(student, batches, width), description)
    if quantizer.coded_rates:
        quantized = quantizer.at_rates(student, batches).walk(quantizer.coded_rates[0])
        size = file_bytes(quantized, description)
        sizes |= {f"{rate} bits/weight": _size_at(rate, quantized, size) for rate in quantizer.coded_rates}
    return sizes


def _size_at(rate: float, quantized: QuantizedModel, size: int) -> int:
    """Bytes of a file like that of `quantized`, of `size` bytes, at another rate."""
    weights = sum(layer.codes.numel() for layer in quantized.layers.values())
    return size + round((rate - quantized.rate) * weights / 8)


def _add(printed: Table, role: str, stem: str, network: nn.Module, input_shape: tuple[int, int, int]) -> None:
    parameters, macs = models.count_parameters(network), models.count_macs(network, input_shape)
    printed.add_row(role, stem, f"{parameters:,}", f"{macs:,}", f"{4 * parameters / 1000:,.0f}")


def _forward(network: nn.Module, batch: int, input_shape: tuple[int, int, int]) -> None:
    network.eval()
    with torch.no_grad():
        network(torch.zeros(batch, *input_shape, device=next(network.parameters()).device)).cpu()


def _step(network: nn.Module, batch: int, input_shape: tuple[int, int, int]) -> None:
    network.train()
    images = torch.randn(batch, *input_shape, device=next(network.parameters()).device)
    loss = network(images).square().mean()
    loss.backward()
    loss.item()


def _seconds(work: Callable[[], None]) -> float:
    """The time of the second of two calls."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
