"""Everything that can be wrong with a run, found in one line before any work is done."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from compress import models
from compress.config import ensemble
from compress.config.compose import Job, compose_jobs
from compress.config.rules import check_rules, uses_peers
from compress.config.stage_plan import compose_stages
from compress.config.values import check_values
from compress.data.dataset import evaluation_batches
from compress.data.memory import free_bytes
from compress.data.shared import DataSets
from compress.errors import UserError, first_line
from compress.export.formats import check_exporters
from compress.export.packed import file_bytes
from compress.files import check_can_be_made
from compress.models import masks
from compress.pipeline.latency import runtime_of
from compress.pipeline.parts import Parts
from compress.pipeline.rehearsal import rehearse
from compress.pipeline.teachers import cache_path
from compress.pruning.recipe import Recipe
from compress.quantization import Quantizer
from compress.training import processes


def checked_jobs(
    overrides: Sequence[str],
    multirun: bool = False,
    data_sets: DataSets | None = None,
    networks: Mapping[str, nn.Module] | None = None,
) -> list[Job]:
    """Every job of a command line, composed and checked. Raises UserError for the first thing that is wrong.

    It looks at every value, at what the parts need of each other, at the files that the run reads and at what has
    to be installed; data that are missing are downloaded here where that is possible. `data_sets` get what is read.
    `networks` are those of `Job`.
    """
    data_sets = data_sets or DataSets()
    jobs = [replace(job, networks=networks or {}) for job in compose_jobs(overrides, multirun)]
    return [check_job(job, data_sets) for job in jobs]


def check_job(job: Job, data_sets: DataSets) -> Job:
    """The composed `job` with its values as their receivers take them, and with its stages composed."""
    check_values(job.config)
    if not job.config.stages:
        check(job, data_sets)
        return job
    stages = compose_stages(job)
    check_stages(stages, data_sets)
    return replace(job, stages=stages)


def check_stages(stages: Sequence[Job], data_sets: DataSets) -> None:
    """Checks the composed `stages`, each with the student that the one before it will leave."""
    student = None
    for stage in stages:
        try:
            check_values(stage.config)
            student = check(stage, data_sets, student)
        except UserError as mistake:
            raise UserError(f"stage {stage.name}: {mistake}") from None


def check(job: Job, data_sets: DataSets, start: nn.Module | None = None) -> nn.Module:
    """Raises UserError for the first thing in a `job`, whose values are checked, that could not work.

    `start` is the student that a stage before will leave, but for the values of its weights; that which this run will
    leave is returned.
    """
    check_rules(job.config, job.overrides)
    parts = Parts(job.config, data_sets, start, job.networks)
    data = parts.data
    if not data.labelled:
        raise UserError(f"data._target_: found {type(data).__name__}, without labels; accepted: data to learn from")
    if job.networks and processes.is_wanted(job.config.trainer):
        raise UserError(
            f"{next(iter(job.networks))}: found a network from Python, which other processes do not have; accepted: "
            "trainer=default, or student=module with its class"
        )
    processes.check(job.config, data.record()["images"], uses_peers(job.config))
    _check_limits(parts)
    parts.build_small()
    _check_teacher_files(parts)
    _check_teacher_cache(parts)
    check_image_sizes(parts)
    _check_method(parts)
    if parts.recipe is not None:
        _check_pruning(parts, parts.recipe)
    _check_validated_epochs(parts)
    student = parts.pruned_student
    if parts.quantizer is not None:
        check_quantizer(parts, parts.quantizer, student)
    check_exporters(parts.exporters, parts.quantizer)
    key = _rehearsed(parts)
    if start is not None or key not in data_sets.rehearsed:
        rehearse(parts, student)
        check_latency(parts, parts.quantizer, student)
        data_sets.rehearsed.add(key)
    return student


def _rehearsed(parts: Parts) -> str:
    """The same for jobs, of a sweep say, that differ in nothing that a rehearsal meets."""
    keys = ("data", "student", "peer", "teacher", "method", "loss", "mixup", "pruning", "quantizer", "export")
    return json.dumps({key: parts.plain.get(key) for key in keys}, sort_keys=True, default=str)


def _check_limits(parts: Parts) -> None:
    """Raises UserError where an epoch would train or validate nothing."""
    trainer, data = parts.config.trainer, parts.data
    images, together = data.record()["images"], processes.processes(trainer)
    batches = {
        "limit_train_batches": len(data.train_dataloader()),
        "limit_val_batches": len(evaluation_batches(images["validation"], data.evaluation_batch_size, 0, together)),
    }
    for key, count in batches.items():
        limit = trainer.get(key)
        if limited(count, limit) < 1:
            raise UserError(
                f"trainer.{key}: found {limit}, which leaves none of the {count} batches; accepted: at least "
                f"{math.ceil(1e4 / count) / 1e4}, or a whole number of batches"
            )


def _check_validated_epochs(parts: Parts) -> None:
    """Raises UserError where no epoch that can be the best is validated."""
    trainer = parts.config.trainer
    every, first, last = trainer.get("check_val_every_n_epoch", 1), parts.first_best_epoch + 1, trainer.max_epochs
    if last // every * every < first:
        raise UserError(
            f"trainer.check_val_every_n_epoch: found {every}, which validates none of the epochs {first} to {last}, of "
            f"which the best is kept; accepted: a number that divides one of these"
        )


def limited(count: int, limit: int | float | None) -> int:
    """How many of `count` batches the Trainer takes under a limit: so many, that share, or all."""
    return count if limit is None else min(count, limit) if isinstance(limit, int) else int(count * limit)


def _check_teacher_files(parts: Parts) -> None:
    for key in ensemble.keys(parts.config):
        if parts.node(key)["checkpoint"]:
            parts.load_teacher(parts.teacher_network(key), key)


def _check_teacher_cache(parts: Parts) -> None:
    """Raises UserError where a teacher that has to be trained could not be kept."""
    for key in parts.teacher_keys:
        if parts.trains_teacher(key) and not (path := cache_path(parts, key)).exists():
            check_can_be_made(path.parent, "output_directory")


def _check_method(parts: Parts) -> None:
    described = parts.described("student", parts.fresh_student)
    if uses_peers(parts.config) and ("channels" in described or masks.masks_of(parts.fresh_student)):
        raise UserError(
            "student.checkpoint: found a pruned network for a method whose peers would not be pruned; accepted: null, "
            "or a method without peers"
        )
    teacher = parts.teacher_network() if parts.teacher_keys == ["teacher"] else None
    parts.method.check_networks(parts.method_options, parts.fresh_student, teacher, parts.data.input_shape)


def check_image_sizes(parts: Parts, training: bool = True) -> None:
    """Raises UserError where a network does not turn an image, which it may shrink to nothing, into logits.

    With `training`, those that will learn have to do so in training too, where some call parts of theirs that they do
    not call otherwise.
    """
    taught_by = parts.teacher_keys
    for role in ("student", *(["peer"] if parts.config.peer else []), *taught_by):
        name = f"{role} {parts.label(role)}"
        learns = role not in taught_by or parts.updates_teacher or parts.trains_teacher(role)
        mistake = _refusal(role, parts, training and learns)
        if isinstance(mistake, UserError):
            raise UserError(f"{name}: {mistake}") from None
        if mistake is not None:
            shape = "x".join(map(str, parts.data.input_shape))
            raise UserError(
                f"data.image_size: found {parts.data.image_size}, images of {shape} with channels first, which {name} "
                f"cannot take ({first_line(mistake)}); accepted: a larger size, or a network for such images"
            )


def _refusal(role: str, parts: Parts, training: bool) -> Exception | None:
    """What the network of a `role` has against images of the data; None where it takes them."""
    mistake = None
    free = free_bytes(torch.device("cpu"))
    # Shapes alone are quick; a network that needs values shows on the CPU whether it works.
    for device in ("cpu",) if parts.is_given(role) else ("meta", "cpu"):
        network = None
        try:
            with torch.device(device), torch.no_grad():
                network = parts.network(role)
                if (needed := 4 * models.count_parameters(network)) > free:
                    return UserError(
                        f"found weights of {needed / 1e6:,.0f} MB, where {free / 1e6:,.0f} are free; accepted: a "
                        "smaller network"
                    )
                for mode in (False, True) if training else (False,):
                    network.train(mode)(torch.zeros(2, *parts.data.input_shape))
            return None
        except Exception as failure:  # a class of the user's can fail with anything
            mistake = failure
            if network is None and not isinstance(failure, UserError):
                mistake = UserError(f"cannot be built ({first_line(failure)}); accepted: other options")
    return mistake


def _check_pruning(parts: Parts, recipe: Recipe) -> None:
    networks = {"student": parts.fresh_student}
    if parts.config.peer:
        networks["peer"] = parts.network("peer")
    for role, network in networks.items():
        recipe.check(network, parts.config.trainer.max_epochs, parts.data.input_shape, role)


def check_latency(parts: Parts, quantizer: Quantizer | None, student: nn.Module) -> None:
    """Raises UserError for a latency that no file of `student` keeps here, or that the float32 one does."""
    if quantizer is not None and quantizer.latency is not None:
        batches = parts.data.calibration_batches(2)
        runtime = runtime_of(parts.exporters, parts.description(student), batches[0])
        quantizer.check_latency(student, batches, runtime)


def check_quantizer(parts: Parts, quantizer: Quantizer, student: nn.Module) -> None:
    """Raises UserError for options of the `quantizer` that do not fit `student`, or a budget that it cannot meet."""
    quantizer.check(student, parts.data.input_shape)
    size = partial(file_bytes, description=parts.description(student))
    quantizer.check_budget(student, parts.data.calibration_batches(2), size, size(student))
