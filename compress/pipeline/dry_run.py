"""`--dry-run`: models, sizes and an estimate of the time, from two timed steps and without training anything."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import nn

from compress import models
from compress.arguments import build
from compress.config import ensemble
from compress.export.packed import file_bytes
from compress.export.weights import build_network
from compress.pipeline import teachers
from compress.pipeline.variants import describe
from compress.progress import console
from compress.quantization import Refinement
from compress.training.fit import device


def show(config: DictConfig, overrides: list[str]) -> None:
    """Prints what the run of `config` would build and about how long it would take on this machine."""
    plain = OmegaConf.to_container(config, resolve=True)
    where = device(plain["trainer"]["accelerator"])
    data = instantiate(config.data, device=where)
    data.prepare_data()
    data.setup()
    images = data.record()["images"]
    student = build_network(plain["student"], data.num_classes)
    if config.pruning:
        student = instantiate(config.pruning).pruned(student, data.input_shape)
    student = student.to(where)
    title = escape(f"dry run: {' '.join(overrides) or 'defaults'}")
    printed = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("", "network", "parameters", "MACs/image", "fp32 kB"):
        printed.add_column(heading, justify="left" if heading in ("", "network") else "right")
    minutes: dict[str, float] = {}
    teacher_seconds = 0.0
    if teachers.is_used(config):
        batch = plain["data"]["batch_size"]
        # What a student's step needs of the teacher.
        work = _step if plain["method"].get("update_teacher") else _forward
        for key in ensemble.keys(config):
            alone = ensemble.alone(config, key)
            node = OmegaConf.to_container(alone.teacher)
            teacher = models.build(num_classes=data.num_classes, **node["model"]).to(where)
            _add(printed, "teacher", node["model"]["stem"], teacher, data.input_shape)
            teacher_seconds += _seconds(partial(work, teacher, batch, data.input_shape))
            if node["checkpoint"] is None and not teachers.cache_path(alone).exists():
                own = node["training"]
                step = _seconds(partial(_step, teacher, own["batch_size"], data.input_shape))
                training = own["epochs"] * (images["train"] / own["batch_size"]) * step / 60
                minutes["teacher"] = minutes.get("teacher", 0.0) + training
    _add(printed, "student", plain["student"]["stem"], student, data.input_shape)
    console.print(printed)

    batch = plain["data"]["batch_size"]
    step = _seconds(lambda: _step(student, batch, data.input_shape)) + teacher_seconds
    minutes["student"] = plain["trainer"]["max_epochs"] * images["train"] / batch * step / 60
    sizes = {}
    grids = get_class(plain["method"]["_target_"]).grids(plain["method"])
    description = describe(models.architecture(plain["student"], data.num_classes, student), data)
    if grids is not None:
        # Steps and codes of an untrained network take as many bytes, but its zeros are none that training would leave.
        sizes["lsq"] = file_bytes(grids.bake(grids.prepare(student)), **description, bitmaps=bool(plain["pruning"]))
    if plain["quantizer"]:
        # The size depends on the zeros alone, so a few images will do, and whatever the options do for the accuracy.
        quantizer = replace(build(config.quantizer, "quantizer"), refinement=Refinement())
        for bits in quantizer.bits:
            solved = quantizer(student, data.calibration_batches(data.num_classes), bits)
            sizes[f"{bits} bit"] = file_bytes(solved, **description)
    if sizes:
        console.print("packed files: " + ", ".join(f"{name} {size / 1000:,.1f} kB" for name, size in sizes.items()))
    total = sum(minutes.values())
    unit, length = ("minutes", 1) if total >= 1 else ("seconds", 60)
    parts = ", ".join(f"{part} {length * value:.1f}" for part, value in minutes.items())
    console.print(
        f"training, about {length * total:.1f} {unit} on this machine ({parts}), and the quantization after it"
    )


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
