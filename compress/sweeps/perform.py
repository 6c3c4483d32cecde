"""Doing one job of a sweep, in this process or another: a run whose failure stays in its directory."""

import gc
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from compress.config.compose import Job, compose_jobs
from compress.config.received import allowed_targets, allowing
from compress.data.shared import DataSets
from compress.errors import in_one_line, printable
from compress.pipeline.check import check_job
from compress.pipeline.execute import execute, resumed_job
from compress.pipeline.resume import OwnedError, started
from compress.stopping import raise_if_stopped
from compress.sweeps.outcomes import FAILED, record_failure
from compress.training.processes import node_rank


def job_in(
    directory: Path, overrides: Sequence[str], settings: Sequence[str], hydra: Sequence[str], data_sets: DataSets
) -> Job:
    """The checked job of a sweep, composed from its `overrides`; one in stages as it was begun in `directory`.

    `settings` are overrides of trainer.* and logger.* beside them, `hydra` those for Hydra itself. All of them are
    trusted, and with them the names of code that they give. Raises UserError.
    """
    [job] = compose_jobs([*overrides, *settings, *hydra])
    if job.config.stages and (directory / "config.yaml").exists():
        allowed, _ = allowed_targets(allowing(job.config))
        return resumed_job(directory, list(settings), data_sets, allowed=allowed)
    return check_job(job, data_sets)


def perform_alone(
    directory: Path,
    overrides: Sequence[str],
    settings: Sequence[str],
    hydra: Sequence[str] | None,
    number: int,
) -> None:
    """Composes, checks and runs a job of a sweep in a process of its own, see `job_in` and `perform`.

    hydra: None where Hydra has set up callbacks and logging already.
    """
    data_sets = DataSets()
    try:
        job = job_in(directory, overrides, settings, hydra or (), data_sets)
    except Exception as failure:
        raise_if_stopped()
        report_failure(failure, directory)
    else:
        perform(job if hydra is not None else replace(job, hydra=None), directory, number, data_sets)


def perform(job: Job, directory: Path, number: int, data_sets: DataSets) -> None:
    """Runs a checked `job` in `directory`; a failure is printed and recorded there, and ends no other job."""
    first = node_rank(job.config.trainer) == 0
    if first:
        (directory / FAILED).unlink(missing_ok=True)
    try:
        execute(job, directory, data_sets, number, logging_is_ours=True)
    except OwnedError:
        # A job of a launcher may outlive the process that started it.
        print(f"{printable(str(directory))}: another process is running this job; it is left alone", file=sys.stderr)
    except Exception as failure:
        raise_if_stopped()
        report_failure(failure, directory if first else None)
    finally:
        # Networks, trainers and loops know each other, so that nothing but the collector frees them.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def report_failure(failure: Exception, directory: Path | None) -> None:
    """Prints `failure`, unless a fault of ours as one line, and records it in `directory` if there is one."""
    line = in_one_line(failure)
    if line is None:
        traceback.print_exception(failure)
    else:
        print(f"error: {line}", file=sys.stderr)
    if directory is not None:
        record_failure(directory, failure)


def hydra_task(config: DictConfig) -> None:
    """What the launcher of a published plugin calls, with Hydra set up for the job."""
    hydra = HydraConfig.get()
    directory, typed = Path(hydra.runtime.output_dir), list(hydra.overrides.task)
    begun = (started(directory) or {"overrides": typed})["overrides"]
    settings = [override for override in typed if override not in begun]
    overrides = [override for override in typed if override in begun]
    perform_alone(directory, overrides, settings, None, hydra.job.num)
