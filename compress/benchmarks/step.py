"""Distilling through the Trainer, in a bare loop and as mdistiller does it: `python scripts/benchmark.py step`.

Every way trains the same student for an epoch of the same pictures, cropped and mirrored at random, in turn: a repeat
has one epoch of each, the first warms up, and ratios are those of one repeat. On the CPU one thread computes, and its
own seconds count; on a GPU those of the clock. The peer's way is that of mdistiller's trainer: PIL images one by one,
float32, channels first, the teacher with its BatchNorm unfolded, both accuracies after every step; on a GPU with
workers that make its batches. Where torchdistill is installed, its own loop is a further way, on the same PIL images.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from compress import models
from compress.benchmarks import spread, torchdistill
from compress.benchmarks.data import DEVIATION, MEAN, PerSample
from compress.data.module import DataModule
from compress.data.source import Source
from compress.errors import UserError
from compress.files import write_json
from compress.losses import kd
from compress.losses.cross_entropy import CrossEntropy
from compress.methods.cached_teacher import CachedTeacher
from compress.methods.frozen_teacher import FrozenTeacher
from compress.methods.kd import KD
from compress.methods.logit_file import LogitFile
from compress.methods.supervised import Supervised
from compress.models.memory_format import lay_out
from compress.optim.schedules import Cosine
from compress.results.surroundings import surroundings
from compress.training.fit import device as device_of
from compress.training.fit import fit

SIZE, CLASSES = 32, 10
WORKERS = 8  # of the peer, on a GPU
WAYS = ("peer", "live", "bare live", "cached", "student", "bare student", "torchdistill")
# The ways whose ratio is printed: how many times as fast the second is as the first.
COMPARED = (
    ("peer", "live"),
    ("peer", "cached"),
    ("peer", "student"),
    ("student", "cached"),
    ("bare live", "live"),
    ("bare student", "student"),
    ("torchdistill", "live"),
    ("torchdistill", "cached"),
)
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", default="resnet56", help="a stem of conf/model")
    parser.add_argument("--student", default="resnet20", help="a stem of conf/model")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=1280, help="in an epoch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", default="32-true", help="of the student in our ways, as trainer.precision")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=(), help="those that take turns (all)")
    parser.add_argument("--json", type=Path, help="a file for the figures, and what they were measured on")


class Pictures(DataModule):
    """Random pictures of 32x32 pixels, augmented as CIFAR's are."""

    def __init__(self, count: int, batch_size: int, device: torch.device) -> None:
        # A tenth more, which are validated on once an epoch, outside of what is measured.
        self.count = round(count / 0.9)
        options: dict[str, Any] = {"crop_padding": 4, "horizontal_flip": True, "device": device}
        super().__init__(image_size=SIZE, batch_size=batch_size, **options)

    def read(self) -> Source:
        images = torch.randint(256, (self.count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
        labels = torch.arange(self.count) % CLASSES
        names = tuple(map(str, range(CLASSES)))
        few = slice(0, CLASSES)
        return Source(images.byte(), labels, images[few].byte(), labels[few], names, MEAN, DEVIATION)


def run(arguments: argparse.Namespace) -> None:
    """Prints images a second for each way, and the ratios; writes them to `--json` if it is given."""
    figures = measured(arguments)
    if arguments.json is not None:
        options = {name: value for name, value in vars(arguments).items() if isinstance(value, int | str | list)}
        write_json(arguments.json, {"options": options, **figures, **surroundings()})


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `run` prints, as figures. Raises UserError where there is no such accelerator."""
    device = device_of(arguments.accelerator)
    if arguments.accelerator == "gpu" and device.type == "cpu":
        raise UserError("--accelerator: found gpu but no usable GPU; accepted here: cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    data = Pictures(arguments.images, arguments.batch_size, device)
    data.setup()
    with tempfile.TemporaryDirectory() as folder:
        ways = _ways(data, arguments, Path(folder))
        times: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(arguments.repeats + 1):
            for name, way in ways.items():
                elapsed = way()
                if repeat:
                    times[name].append(elapsed)
    steps = len(data.splits["train"]) // arguments.batch_size
    speeds = {name: steps * arguments.batch_size / statistics.median(some) for name, some in times.items()}
    what = "one thread, CPU seconds" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"{arguments.teacher} -> {arguments.student}, batch {arguments.batch_size}, {what}")
    for name, speed in speeds.items():
        print(f"  {name}: {speed:,.0f} images/s")
    compared = [pair for pair in COMPARED if {*pair} <= {*times}]
    ratios = {f"{fast} / {slow}": _ratios(times[slow], times[fast]) for slow, fast in compared}
    for name, pairs in ratios.items():
        print(f"  {name}: {spread(pairs)}")
    medians = {name: statistics.median(pairs) for name, pairs in ratios.items()}
    figures = {"images_per_second": speeds, "ratios": medians, "seconds": times}
    if {"student", "bare student"} <= {*times}:
        pairs_of_student = zip(times["student"], times["bare student"], strict=True)
        overhead = 1000 / steps * statistics.median(one - other for one, other in pairs_of_student)
        print(f"  the Trainer takes {overhead:.2f} ms a step more than a bare loop of the student")
        figures["overhead_ms"] = overhead
    return figures


def _ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(slow, fast, strict=True)]


def _ways(data: Pictures, arguments: argparse.Namespace, folder: Path) -> dict[str, Callable[[], float]]:
    """Each trains a fresh student for an epoch and gives the seconds of its steps."""
    device = data.device

    def network(stem: str) -> nn.Module:
        torch.manual_seed(0)
        return models.build(stem, CLASSES)

    student, original = partial(network, arguments.student), network(arguments.teacher).eval().to(device)
    teacher = FrozenTeacher(original, data.input_shape)
    teacher.to(device)
    replayed = Pictures(arguments.images, arguments.batch_size, device)
    replayed.setup()
    replayed.replay(1)

    def opened(view: int | None) -> LogitFile:
        return LogitFile(folder / f"{view}.logits", len(replayed.splits["train"]), CLASSES, {})

    def trainer(data: Pictures, method: type[Any], **supplied: Any) -> float:
        module = method(
            student=student(),
            optimizer=_sgd,
            scheduler=Cosine(),
            num_classes=CLASSES,
            input_shape=data.input_shape,
            **supplied,
        )
        with tempfile.TemporaryDirectory(dir=folder) as run_folder:
            options = {
                "max_epochs": 1,
                "accelerator": arguments.accelerator,
                "devices": 1,
                "precision": arguments.precision,
            }
            clock = _Clock(device)
            fit(
                module,
                data,
                {**options, "early_stopping": None, "log_every": 0},
                Path(run_folder),
                label="student",
                callbacks=[clock],
            )
            return clock.elapsed

    def cached() -> float:
        through = CachedTeacher(teacher, 1, opened, replayed.training_view, device)
        through.begin_epoch(0)
        return trainer(replayed, KD, loss=kd.KD(), teacher=through)

    autocast = arguments.precision.startswith("bf16")

    def bare(teacher: FrozenTeacher | None) -> float:
        model = student().train().to(device)
        lay_out(model, data.input_shape)
        return _epoch(model, data.train_dataloader(), _loss(teacher), device, autocast)

    images = data.splits["train"].images
    pixels = cast(Tensor, images).cpu().permute(0, 2, 3, 1).contiguous().numpy()
    workers: dict[str, Any] = (
        {} if device.type == "cpu" else {"num_workers": WORKERS, "persistent_workers": True, "pin_memory": True}
    )
    loader: dict[str, Any] = {"batch_size": arguments.batch_size, "drop_last": True, **workers}
    per_sample: DataLoader[Any] = DataLoader(PerSample(pixels), shuffle=True, **loader)
    ways: dict[str, Callable[[], float]] = {
        "peer": lambda: _epoch(student().train().to(device), per_sample, _loss(original), device, metrics=True),
        "live": partial(trainer, data, KD, loss=kd.KD(), teacher=teacher),
        "bare live": partial(bare, teacher),
        "cached": cached,
        "student": partial(trainer, data, Supervised, loss=CrossEntropy()),
        "bare student": partial(bare, None),
    }
    if torchdistill.installed():
        box = torchdistill.distillation_box(original, student(), PerSample(pixels), device, loader, {**SGD})
        ways["torchdistill"] = partial(_seconds, partial(torchdistill.train, box, device), device)
    elif "torchdistill" in arguments.ways:
        raise UserError("--ways: found torchdistill, which is not installed; accepted after: pip install torchdistill")
    return {name: way for name, way in ways.items() if name in (arguments.ways or WAYS)}


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    started = _now(device)
    work()
    return _now(device) - started


class _Clock(pl.Callback):
    """Seconds from the first step of the epoch to its last."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.elapsed = device, 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.elapsed = -_now(self.device)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        # Before the validation, which ends an epoch.
        if batch[-1] + 1 == trainer.num_training_batches:
            self.elapsed += _now(self.device)


def _now(device: torch.device) -> float:
    """Seconds of this process on the CPU, or of the clock when the GPU has done all that it was given."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, **SGD, fused=True)


def _loss(teacher: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(images: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        cross_entropy = nn.functional.cross_entropy(logits, target)
        if teacher is None:
            return cross_entropy
        with torch.no_grad():
            expected = teacher(images)
        return 0.1 * cross_entropy + 0.9 * kd.kd_loss(logits, expected, 4.0)

    return loss


def _epoch(
    model: nn.Module,
    batches: DataLoader[Any],
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    device: torch.device,
    autocast: bool = False,
    metrics: bool = False,
) -> float:
    """Seconds of a loop without a Trainer; with `metrics` both accuracies are read after every step."""
    optimizer = _sgd(model.parameters())
    started = _now(device)
    for batch in batches:
        images, target = (part.to(device, non_blocking=True) for part in batch)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            logits = model(images)
        value = loss(images, logits.float(), target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if metrics:
            value.item()
            found = logits.topk(5, 1).indices == target[:, None]
            [found[:, :count].any(1).float().mean().item() for count in (1, 5)]
    return _now(device) - started
