"""One run, top to bottom: data, teacher, student, best checkpoint, quantization, results."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger
from torch import nn

from compress import models
from compress.arguments import build, check_arguments, parameter_names
from compress.config.compose import method_name
from compress.errors import UserError
from compress.export.weights import build_network
from compress.files import write_json, write_text
from compress.optim.groups import optimizer_factory
from compress.pipeline import resume, teachers
from compress.pipeline.measure import PostTrainingQuantization
from compress.pipeline.resume import STARTED
from compress.progress import console
from compress.pruning.recipe import MaskRecipe
from compress.results.record import surroundings
from compress.results.tradeoff import DAMAGED, Row, read_rows
from compress.results.wandb_run import open_loggers
from compress.results.writing import show, write_results
from compress.training import distributed, processes
from compress.training.fit import BEST, device, epoch_of, fit
from compress.training.pruning import Pruning


@dataclass(frozen=True)
class Result:
    """Where a finished run lies, its trade-off rows and the content of its `result.json`."""

    directory: Path
    rows: tuple[Row, ...]
    record: dict[str, Any]


def run(
    config: DictConfig, directory: Path, overrides: Sequence[str] = (), reference: Path | None = None
) -> Result | None:
    """Does what a checked `config` says and leaves the results in `directory`; a run found there is continued.

    reference: the checkpoint of the float network that one trained on grids is compared with, if it is not
    `student.checkpoint`, which may have been trained on grids itself.

    Everything a run leaves is described in `compress.results`. The result of a finished run is read and returned. Of
    several machines only the first has a result.
    """
    if processes.node_rank(config.trainer) > 0:
        return distributed.join(config, directory, worker_command(directory))
    with resume.owned(directory):
        if (directory / "result.json").exists():
            return finished(directory)
        processes.act_alone()
        started = record_start(directory, overrides)
        write_text(directory / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
        clock = _Clock()
        if processes.is_wanted(config.trainer):
            try:
                with distributed.ends_all(config.trainer, directory):
                    distributed.train(
                        config, directory, lambda: _have_teacher(config, directory), worker_command(directory)
                    )
            except BaseException:
                # The process that had opened them is dead; what they keep elsewhere has to end all the same.
                with open_loggers(config, directory, started["overrides"]):
                    raise
            clock.lap("distributed")
        with open_loggers(config, directory, started["overrides"]) as loggers:
            return _run(config, directory, started, clock, loggers, reference)


def worker_command(directory: Path) -> list[str]:
    """What starts one of the processes that train the run in `directory` together."""
    return [sys.executable, "-P", "-m", "compress.pipeline.worker", str(directory)]


def _have_teacher(config: DictConfig, directory: Path) -> None:
    if teachers.is_used(config):
        data = instantiate(config.data, seed=config.seed, device=device(config.trainer.accelerator))
        data.prepare_data()
        data.setup()
        teachers.resolve(config, data, OmegaConf.to_container(config.trainer, resolve=True), directory)


def train(config: DictConfig, directory: Path) -> None:
    """The part of `run` that belongs to each process of a training in several; the rest follows elsewhere."""
    started = record_start(directory, ())
    with open_loggers(config, directory, started["overrides"]) as loggers:
        _run(config, directory, started, _Clock(), loggers)


def _run(
    config: DictConfig,
    directory: Path,
    started: Mapping[str, Any],
    clock: "_Clock",
    loggers: Sequence[Logger],
    reference: Path | None = None,
) -> Result | None:
    plain = OmegaConf.to_container(config, resolve=True)
    pl.seed_everything(config.seed, verbose=False)

    data = instantiate(config.data, seed=config.seed, device=device(config.trainer.accelerator))
    data.prepare_data()
    data.setup()
    clock.lap("data")

    method = get_class(config.method._target_)
    parts: dict[str, Any] = {"num_classes": data.num_classes, "seed": config.seed}
    if "input_shape" in parameter_names(method):
        parts["input_shape"] = data.input_shape
    teacher, updates_teacher = None, config.method.get("update_teacher", False)
    if teachers.is_used(config):
        teacher = teachers.resolve(config, data, plain["trainer"], directory)
        parts["teacher"] = teacher.learning if updates_teacher else teacher.frozen
    clock.lap("teacher")

    # The teacher's training may have drawn random numbers; the student's first weights depend on the seed alone.
    pl.seed_everything(config.seed, verbose=False)
    student = build_network(plain["student"], data.num_classes)
    recipe = instantiate(config.pruning) if config.pruning else None
    if recipe is not None:
        student = recipe.shrink(student, data.input_shape)
    parts["student"] = student.to(memory_format=torch.channels_last)
    parts |= {part: instantiate(config[part]) for part in ("loss", "scheduler")}
    parts["optimizer"] = optimizer_factory(plain["optimizer"])
    parts["mixup"] = instantiate(config.mixup) if config.mixup else None
    architectures = {"model": models.architecture(plain["student"], data.num_classes, student)}
    if "peers" in parameter_names(method):
        peer = plain["peer"] or plain["student"]
        fresh = peer | {"checkpoint": None}
        others = [build_network(fresh, data.num_classes) for _ in range(config.method.peers - 1)]
        if recipe is not None:
            others = [recipe.shrink(other, data.input_shape) for other in others]
        parts["others"] = [other.to(memory_format=torch.channels_last) for other in others]
        for index, other in enumerate(others):
            architectures[f"others.{index}"] = models.architecture(peer, data.num_classes, other)
    # Not by `instantiate`, which would turn the frozen dataclasses among the parts into configurations.
    module = method(**check_arguments(method, plain["method"], "method"), **parts)
    if not processes.is_wanted(config.trainer):
        console.print(f"student {config.student.stem}: training for {config.trainer.max_epochs} epochs", style="bold")

    quantizer = build(config.quantizer, "quantizer") if config.quantizer else None
    quantization = PostTrainingQuantization(
        data,
        directory,
        architectures,
        quantizer,
        plain["export"],
        on_grids=module.on_grids,
        start=_start(plain["student"], data.num_classes, architectures["model"], reference),
        before=clock.lap,
    )
    masked = isinstance(recipe, MaskRecipe)
    pruning = Pruning(module.networks, recipe if masked else None, architectures)
    trainer = fit(
        module,
        data,
        plain["trainer"],
        directory / "checkpoints",
        label="student",
        loggers=loggers,
        callbacks=[pruning, processes.Worker() if processes.is_worker() else quantization],
        first_best=max(recipe.window(config.trainer.max_epochs)[1] - 1, 0) if masked else 0,
    )
    if processes.is_worker():
        return None
    teacher_record = teachers.test_record(teacher, data, updates_teacher) if teacher else None
    clock.lap("quantization")

    variants = quantization.variants
    stem = architectures[quantization.network]["stem"]
    record = {
        "format": 1,
        **started,
        **surroundings(),
        "seed": config.seed,
        "seconds": clock.laps,
        "data": data.record(),
        "teacher": teacher_record,
        "pruning": recipe.record(quantization.trained) if recipe is not None else None,
        "student": {
            "model": stem,
            "network": quantization.network,
            "parameters": models.count_parameters(quantization.student),
            "macs": models.count_macs(quantization.student, data.input_shape),
            "epochs": trainer.current_epoch,
            "best_epoch": epoch_of(directory / "checkpoints" / BEST),
            "validation_accuracy": variants.rows[0].validation_accuracy,
            "test_accuracy": variants.rows[0].test_accuracy,
            "test_accuracy_per_class": dict(zip(data.class_names, variants.test.per_class, strict=True)),
        },
    }
    title = f"{method_name(config)} {stem} on {config.data._target_.rpartition('.')[2]}"
    teacher_accuracy = teacher_record["test_accuracy"] if teacher_record else None
    record = write_results(directory, variants, record, title, teacher_accuracy, loggers)
    (directory / STARTED).unlink()
    show(directory, variants.rows, title)
    return Result(directory, tuple(variants.rows), record)


def _start(
    node: dict[str, Any], num_classes: int, architecture: dict[str, Any], reference: Path | None
) -> nn.Module | None:
    """The float network that training started from, unless there is none or it has lost channels since."""
    checkpoint = reference or node.get("checkpoint")
    if checkpoint is None:
        return None
    with torch.random.fork_rng(devices=[]):
        start = build_network(node | {"checkpoint": str(checkpoint)}, num_classes)
    return start if models.architecture(node, num_classes, start) == architecture else None


def finished(directory: Path) -> Result:
    """The result of a run that was finished before, which is printed again."""
    path = directory / "result.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = read_rows(record)
        model = record["student"]["model"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"resume: found {path}, {DAMAGED}") from None
    show(directory, rows, f"{model}: this run was finished before")
    return Result(directory, tuple(rows), record)


def record_start(directory: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """What was typed and when, kept until the run is finished so that a resumed run can still say it."""
    path = directory / STARTED
    if not path.exists():
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        job = os.environ.get("SLURM_JOB_ID")
        write_json(path, {"overrides": list(overrides), "started": now} | ({"slurm_job": job} if job else {}))
    try:
        started = json.loads(path.read_text(encoding="utf-8"))
        return {"overrides": list(started["overrides"]), **started}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"resume: found {path}, which cannot be read; accepted: to remove it, and the run goes on without it"
        ) from None


class _Clock:
    """The seconds of each part of a run."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.laps[part] = round(now - self.last, 2)
        self.last = now
