"""Doing a checked job, whoever asked for it: the command line, `compress.run`, a sweep, a search, a study, a resume."""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.utils import JobReturn, run_job
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write
from torch import nn

from compress.config.compose import Job
from compress.config.recorded import change, read_config
from compress.config.stage_plan import stage_directories, start_from
from compress.config.values import check_values
from compress.data.shared import DataSets
from compress.pipeline.check import check, check_stages
from compress.pipeline.run import Result, run
from compress.pipeline.stages import run_stages
from compress.training.fit import BEST
from compress.training.processes import node_rank


def execute(
    job: Job, directory: Path, data_sets: DataSets, number: int | None = None, logging_is_ours: bool = False
) -> Result | None:
    """Does a checked `job` in `directory`, in stages if it has any, and returns its result.

    A job that was composed is run as Hydra runs one: with its callbacks, its environment and a `run.log`. `number` is
    that of a job of a sweep. With `logging_is_ours` the process logs as `hydra.job_logging` says; otherwise its logging
    is the caller's, and only the file is added. Of several machines only the first has a result.
    """
    work = run_stages if job.config.stages else run
    # A machine that is not the first leaves the directory to that.
    if job.hydra is None or node_rank(job.config.trainer) > 0:
        return work(job, directory, data_sets)
    # What is printed for going on holds in any working directory, and Hydra may change it.
    directory = directory.absolute()
    with _logging_undone() if logging_is_ours else _log_in(directory):
        ended = _as_hydra_does(
            job.hydra, directory, number, lambda config: work(job, directory, data_sets), logging_is_ours
        )
    # Not `return_value`: Hydra would print a line of its own before ours.
    result: Result | Exception | None = ended._return_value
    if isinstance(result, Exception):
        raise result
    return result


def resumed_job(
    directory: Path,
    overrides: list[str],
    data_sets: DataSets,
    networks: Mapping[str, nn.Module] | None = None,
    allowed: Collection[str] = (),
) -> Job:
    """The job that was begun in `directory`, changed by `overrides` of trainer.* and logger.*, and checked.

    `networks` are those that the run was given from Python, see `Job`; `allowed` as in `read_config`.
    Raises UserError for the first thing that is wrong. What is finished is not checked again.
    """
    config = read_config(directory, allowed)
    change(config, overrides)
    check_values(config)
    networks = networks or {}
    job = Job(tuple(overrides), config, networks=networks)
    if (directory / "result.json").exists():
        return job
    if not config.stages:
        check(replace(job, overrides=()), data_sets)
        return job
    stages, unfinished, checkpoint = [], [], None
    for name in stage_directories(config):
        stage = Job((), read_config(directory / name, allowed), name=name, networks=networks)
        stages.append(stage)
        if (directory / name / "result.json").exists():
            checkpoint = directory / name / "checkpoints" / BEST
            continue
        change(stage.config, overrides)
        if checkpoint is not None:
            start_from(stage.config, checkpoint)
            checkpoint = None
        unfinished.append(stage)
    check_stages(unfinished, data_sets)
    return replace(job, stages=tuple(stages))


def _as_hydra_does(
    composed: DictConfig, directory: Path, number: int | None, task: TaskFunction, configure_logging: bool
) -> JobReturn:
    with read_write(composed), open_dict(composed):
        composed.hydra.run.dir = str(directory)
        if number is not None:
            composed.hydra.job.num = number
            composed.hydra.job.id = str(number)
    callbacks = Callbacks(composed)
    if number is None:
        callbacks.on_run_start(config=composed, config_name="run")
    loader: Any = None  # which composes, and that is done
    ended = run_job(
        task_function=task,
        config=composed,
        job_dir_key="hydra.run.dir",
        job_subdir_key=None,
        hydra_context=HydraContext(config_loader=loader, callbacks=callbacks),
        configure_logging=configure_logging,
    )
    if number is None:
        callbacks.on_run_end(config=composed, config_name="run", job_return=ended)
    return ended


@contextmanager
def _log_in(directory: Path) -> Iterator[None]:
    """Within it, what is logged goes to `run.log` too, as Hydra's logging would have it."""
    directory.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(directory / "run.log", encoding="utf-8")
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


@contextmanager
def _logging_undone() -> Iterator[None]:
    """Takes back the handlers that Hydra gives the process for a job."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
