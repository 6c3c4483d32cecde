"""Everything that can be wrong with a run, found in one line before any work is done."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.config import ensemble
from compress.config.compose import Job, compose_jobs
from compress.config.rules import check_rules, uses_peers
from compress.config.stage_plan import compose_stages
from compress.config.values import check_values
from compress.data.shared import DataSets
from compress.errors import UserError, first_line
from compress.export.formats import check_exporters
from compress.export.packed import file_bytes
from compress.export.weights import load_weights
from compress.models import masks
from compress.pipeline.parts import Parts
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
    if job.networks and processes.is_wanted(job.config.trainer):
        raise UserError(
            f"{next(iter(job.networks))}: found a network from Python, which other processes do not have; accepted: "
            "trainer=default, or student=module with its class"
        )
    processes.check(job.config, data.record()["images"], uses_peers(job.config))
    parts.build_small()
    _check_teacher_files(parts)
    _check_method(parts)
    check_image_sizes(parts)
    if parts.recipe is not None:
        _check_pruning(parts)
    student = parts.pruned_student
    if parts.quantizer is not None:
        check_quantizer(parts, student)
    check_exporters(parts.exporters, parts.quantizer)
    return student


def _check_teacher_files(parts: Parts) -> None:
    for key in ensemble.keys(parts.config):
        checkpoint = parts.node(key)["checkpoint"]
        if checkpoint:
            load_weights(parts.teacher_network(key), Path(checkpoint), where=f"{key}.checkpoint")


def _check_method(parts: Parts) -> None:
    described = parts.described("student", parts.fresh_student)
    if uses_peers(parts.config) and ("channels" in described or masks.masks_of(parts.fresh_student)):
        raise UserError(
            "student.checkpoint: found a pruned network for a method whose peers would not be pruned; accepted: null, "
            "or a method without peers"
        )
    teacher = parts.teacher_network() if parts.teacher_keys == ["teacher"] else None
    parts.method.check_networks(parts.method_options, parts.fresh_student, teacher, parts.data.input_shape)


def check_image_sizes(parts: Parts) -> None:
    """Raises UserError where an image does not go through a network, which may shrink it to nothing."""
    for role in ("student", *(["peer"] if parts.config.peer else []), *parts.teacher_keys):
        found = _output(role, parts)
        classes, name = parts.data.num_classes, f"{role} {parts.label(role)}"
        if isinstance(found, Exception):
            raise UserError(
                f"data.image_size: found {parts.data.image_size}, which {name} cannot take "
                f"({first_line(found)}); accepted: a larger size, or another network"
            )
        if tuple(found.shape) != (1, classes):
            raise UserError(f"{name}: found outputs {tuple(found.shape)} of one image; accepted: logits (1, {classes})")


def _output(role: str, parts: Parts) -> Tensor | Exception:
    """What the network of a `role` makes of an image of the data, or what it has against it."""
    mistake: Exception | None = None
    # Shapes alone are quick; a network that needs values shows on the CPU whether it works.
    for device in ("cpu",) if parts.is_given(role) else ("meta", "cpu"):
        try:
            with torch.device(device), torch.no_grad():
                return parts.network(role).eval()(torch.zeros(1, *parts.data.input_shape))
        except UserError as wrong:
            raise UserError(f"{role}: {wrong}") from None
        except Exception as failure:  # a forward of the user's can fail with anything
            mistake = failure
    return mistake


def _check_pruning(parts: Parts) -> None:
    networks = {"student": parts.fresh_student}
    if parts.config.peer:
        networks["peer"] = parts.network("peer")
    for role, network in networks.items():
        parts.recipe.check(network, parts.config.trainer.max_epochs, parts.data.input_shape, role)


def check_quantizer(parts: Parts, student: nn.Module) -> None:
    """Raises UserError for options of the quantizer that do not fit `student`, or a budget that it cannot meet."""
    parts.quantizer.check(student, parts.data.input_shape)
    size = partial(file_bytes, description=parts.description(student))
    parts.quantizer.check_budget(student, parts.data.calibration_batches(2), size, size(student))
