"""One run, top to bottom: data, teacher, student, best checkpoint, quantization, results."""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger

from compress import models
from compress.config.compose import Job
from compress.config.received import allowing
from compress.config.recorded import write_config
from compress.data.shared import DataSets
from compress.methods.cached_teacher import CachedTeacher
from compress.methods.frozen_teacher import FrozenEnsemble, FrozenTeacher
from compress.methods.learning_teacher import LearningTeacher
from compress.pipeline import precision, resume, teachers
from compress.pipeline.measure import Measured, PostTrainingQuantization, measure_best
from compress.pipeline.parts import Parts
from compress.pipeline.teacher_cache import with_cache
from compress.pipeline.teachers import Teacher
from compress.progress import console
from compress.results.loggers import open_loggers
from compress.results.record import Record
from compress.results.tradeoff import Row
from compress.results.writing import show, write_results
from compress.training import distributed, processes
from compress.training.fit import BEST, epoch_of, fit
from compress.training.pruning import Pruning
from compress.training.threads import threads_for


@dataclass(frozen=True)
class Result:
    """Where a finished run lies, and what it recorded."""

    directory: Path
    record: Record

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.record.rows


@dataclass(frozen=True)
class Trained:
    """What a training leaves; one of several processes leaves nothing `measured`. `threads`: that it computed on."""

    teacher: Teacher | None
    trainer: pl.Trainer
    threads: int
    measured: Measured | None


def run(job: Job, directory: Path, data_sets: DataSets, float_checkpoint: Path | None = None) -> Result | None:
    """Does what a checked `job` without stages says and leaves the results in `directory`.

    A run found there is continued; of one that is finished the result is read and returned. Of several machines only
    the first has a result. `float_checkpoint` is that of the float network that one trained on grids is compared
    with, if it is not `student.checkpoint`, which may have been trained on grids itself.

    Everything a run leaves is described in `compress.results`.
    """
    if processes.node_rank(job.config.trainer) > 0:
        distributed.join(job.config, directory, _worker_command(directory))
        return None
    with resume.owned(directory, allowing(job.config)):
        if (directory / "result.json").exists():
            return finished(directory)
        processes.act_alone()
        started = resume.record_start(directory, job.overrides)
        precision.settle([job], directory, data_sets)
        write_config(directory, job.config)
        clock = _Clock()
        if processes.is_wanted(job.config.trainer):
            # They leave a finished last.ckpt, from which `_train` goes straight on to the measuring.
            _train_in_processes(job.config, directory, data_sets)
            clock.lap("distributed")
        parts = Parts(job.config, data_sets, networks=job.networks)
        with open_loggers(job.config, directory) as loggers:
            trained = _train(parts, directory, loggers, clock, float_checkpoint)
            teacher_record = teachers.tested(trained.teacher, parts) if trained.teacher else None
            clock.lap("quantization")
            measured = trained.measured
            assert measured is not None  # only the processes that this one starts do not measure
            about = measured.record(
                parts,
                trained.threads,
                network=measured.name,
                epochs=trained.trainer.current_epoch,
                best_epoch=epoch_of(directory / "checkpoints" / BEST),
            )
            pruning = None if parts.recipe is None else parts.recipe.record(measured.trained)
            about |= {"method": parts.plain["method"]["stem"], "teacher": teacher_record, "pruning": pruning}
            record = Record(**started, seconds=clock.laps, **about)
            title = f"{parts.plain['method']['stem']} {record.student.model} on {record.data.name}"
            record = write_results(directory, record, title, measured.panels(), loggers)
            (directory / resume.STARTED).unlink()
            show(directory, record, title)
            return Result(directory, record)


def train(config: DictConfig, directory: Path) -> None:
    """What each process of a training in several does; the process that started them measures and writes."""
    with open_loggers(config, directory) as loggers:
        _train(Parts(config), directory, loggers, _Clock())


def _train(
    parts: Parts, directory: Path, loggers: Sequence[Logger], clock: "_Clock", float_checkpoint: Path | None = None
) -> Trained:
    """Finds or trains the teacher, trains the student and measures what becomes of it."""
    seed = parts.plain["seed"]
    pl.seed_everything(seed, verbose=False)
    data = parts.data
    clock.lap("data")
    teacher = teachers.resolve(parts, directory)
    clock.lap("teacher")
    # The teacher's training may have drawn random numbers; the student's first weights depend on the seed alone.
    pl.seed_everything(seed, verbose=False)
    module = parts.learner(teacher and _teaching(teacher, parts))
    if not processes.is_wanted(parts.plain["trainer"]):
        epochs = parts.plain["trainer"]["max_epochs"]
        console.print(f"student {parts.label('student')}: training for {epochs} epochs", style="bold")

    def measure() -> Measured:
        clock.lap("student")
        return measure_best(parts, directory, float_checkpoint)

    quantization = PostTrainingQuantization(measure)
    pruning = Pruning(module.networks, parts.mask_recipe, parts.architectures)
    macs = sum(models.count_macs(network, data.input_shape) for network in [parts.student, *parts.peers])
    macs += teacher.record["macs"] if teacher else 0
    with threads_for(macs * data.batch_size) as threads:
        trainer = fit(
            module,
            data,
            parts.plain["trainer"],
            directory / "checkpoints",
            label="student",
            loggers=loggers,
            callbacks=[pruning, processes.Worker() if processes.is_worker() else quantization],
            first_best=parts.first_best_epoch,
        )
    if teacher and isinstance(module.teacher, CachedTeacher):
        teacher.record["cache"] = module.teacher.record()
    return Trained(teacher, trainer, threads, quantization.measured)


def _teaching(
    teacher: Teacher, parts: Parts
) -> LearningTeacher | FrozenTeacher | FrozenEnsemble | CachedTeacher | None:
    """The form of `teacher` that the method calls."""
    if parts.updates_teacher:
        return teacher.learning
    return with_cache(teacher.frozen, parts, teacher.record["model"])


def _train_in_processes(config: DictConfig, directory: Path, data_sets: DataSets) -> None:
    def have_teacher() -> None:
        teachers.resolve(Parts(config, data_sets), directory)
        data_sets.clear()

    try:
        with distributed.ends_all(config.trainer, directory):
            distributed.train(config, directory, have_teacher, _worker_command(directory))
    except BaseException:
        # The process that had opened them is dead; what they keep elsewhere has to end all the same.
        with open_loggers(config, directory):
            raise


def _worker_command(directory: Path) -> list[str]:
    """What starts one of the processes that train the run in `directory` together."""
    return [sys.executable, "-P", "-m", "compress.pipeline.worker", str(directory)]


def finished(directory: Path) -> Result:
    """The result of a run that was finished before, which is printed again."""
    record = Record.read(directory / "result.json")
    # Which is left where it was killed just before; a finished run may well be read-only.
    with suppress(OSError):
        (directory / resume.STARTED).unlink(missing_ok=True)
    show(directory, record, f"{record.student.model}: this run was finished before")
    return Result(directory, record)


class _Clock:
    """The seconds of each part of a run."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.laps[part] = round(now - self.last, 2)
        self.last = now
