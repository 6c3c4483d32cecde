"""A run of several stages, each a run of its own in a sub-directory that starts from the student of the one before.

`1-prune/`, `2-quantize/` and so on hold what any run leaves; the result and the table of the whole, beside them, are
those of the last stage. An interrupted one is continued at the stage, and within it at the epoch, where it was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from compress.config import compose as configuration
from compress.errors import UserError
from compress.files import write_text
from compress.pipeline import resume
from compress.pipeline import run as pipeline
from compress.pipeline.checks import check
from compress.pipeline.run import Result
from compress.progress import console
from compress.results.record import Stage
from compress.results.writing import show, write_results
from compress.training.fit import BEST


def run(config: DictConfig, directory: Path, overrides: Sequence[str] = ()) -> Result | None:
    """Does what a checked `config` says, in stages if it has any; without, this is `compress.pipeline.run.run`."""
    if not config.get("stages"):
        return pipeline.run(config, directory, overrides)
    with resume.owned(directory):
        if (directory / "result.json").exists():
            return pipeline.finished(directory)
        return _run(config, directory, overrides)


def _run(config: DictConfig, directory: Path, overrides: Sequence[str]) -> Result:
    started = pipeline.record_start(directory, overrides)
    if (directory / "config.yaml").exists():
        _heed(config, directory, [each for each in overrides if each not in started["overrides"]])
    else:
        for name, composed in configuration.compose_stages(config, overrides):
            write_text(directory / name / "config.yaml", OmegaConf.to_yaml(composed, resolve=True))
    # Only now, because its presence says that the configurations of the stages are all there.
    write_text(directory / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    names = configuration.stage_directories(config)
    results: list[Result] = []
    reference = None
    for number, name in enumerate(names, 1):
        stage = configuration.read_config(directory / name)
        if results:
            stage.student.checkpoint = str(results[-1].directory / "checkpoints" / BEST)
        if not (directory / name / "result.json").exists():
            check(stage)
        console.print(f"stage {number} of {len(names)}: {config.stages[number - 1].name}", style="bold")
        results.append(pipeline.run(stage, directory / name, started["overrides"], reference))
        if get_class(stage.method._target_).grids(stage.method) is None:
            reference = results[-1].directory / "checkpoints" / BEST
    return _whole(config, directory, started, results)


def refuse_epochs(override: str) -> None:
    """Raises UserError where `override` would change the epochs of stages that were shared out before."""
    if override.startswith("trainer.max_epochs="):
        raise UserError(f"{override}: the stages of a resumed run keep their epochs; accepted: other trainer.*=...")


def _heed(config: DictConfig, directory: Path, overrides: Sequence[str]) -> None:
    """Changes the stages that are not finished by `overrides` of trainer.* and logger.*, typed for a resumed run."""
    for name in configuration.stage_directories(config):
        if not (directory / name / "result.json").exists():
            stage = configuration.read_config(directory / name)
            for override in overrides:
                refuse_epochs(override)
                configuration.apply_override(stage, override)
            write_text(directory / name / "config.yaml", OmegaConf.to_yaml(stage, resolve=True))


def _whole(config: DictConfig, directory: Path, started: Mapping[str, Any], results: Sequence[Result]) -> Result:
    last = results[-1].record
    stages = [
        Stage(
            name=stage.name,
            directory=result.directory.name,
            overrides=list(stage.overrides),
            seconds=round(sum(result.record.seconds.values()), 2),
            pruning=result.record.pruning,
            student=result.record.student,
            variant=result.rows[-1],
        )
        for stage, result in zip(config.stages, results, strict=True)
    ]
    folder = stages[-1].directory
    changes = {
        "seconds": {stage.directory: stage.seconds for stage in stages},
        "pruning": next((stage.pruning for stage in reversed(stages) if stage.pruning), None),
        "student": last.student.model_copy(update={"epochs": sum(stage.student.epochs for stage in stages)}),
        "stages": stages,
        "rows": tuple(replace(row, file=row.file and f"{folder}/{row.file}") for row in last.rows),
    }
    record = last.model_copy(update={**started, **changes})
    title = f"{record.student.model}: {', '.join(stage.name for stage in stages)}"
    write_results(directory, record, title)
    (directory / resume.STARTED).unlink()
    show(directory, record.rows, title)
    return Result(directory, record)
