"""A run of several stages, each a run in a sub-directory that starts from the student of the one before.

`1-prune/`, `2-quantize/` and so on hold what any run leaves; the result and the table beside them are those of the
last stage. An interrupted run is continued at the stage, and within it at the epoch, where it was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress.config.compose import Job
from compress.config.received import allowing
from compress.config.recorded import write_config
from compress.config.stage_plan import start_from
from compress.data.shared import DataSets
from compress.pipeline import precision, resume
from compress.pipeline.parts import Parts, digest_of
from compress.pipeline.run import Result, finished, run
from compress.progress import console
from compress.results.record import Stage
from compress.results.writing import show, write_results
from compress.training.fit import BEST


def run_stages(job: Job, directory: Path, data_sets: DataSets) -> Result:
    """Does what a checked `job` with stages says and leaves the results in `directory`."""
    with resume.owned(directory, allowing(job.config)):
        if (directory / "result.json").exists():
            return finished(directory)
        started = resume.record_start(directory, job.overrides)
        precision.settle([*job.stages, job], directory, data_sets)
        for stage in job.stages:
            if not (directory / stage.name / "result.json").exists():
                write_config(directory / stage.name, stage.config)
        # Only now, because its presence says that the configurations of the stages are all there.
        write_config(directory, job.config)
        return _write(job, directory, started, _run_each(job, directory, data_sets, started["overrides"]))


def _run_each(job: Job, directory: Path, data_sets: DataSets, overrides: Sequence[str]) -> list[Result]:
    results: list[Result] = []
    float_checkpoint = None
    for number, stage in enumerate(job.stages, 1):
        if results:
            start_from(stage.config, results[-1].directory / "checkpoints" / BEST)
        console.print(f"stage {number} of {len(job.stages)}: {job.config.stages[number - 1].name}", style="bold")
        stage = replace(stage, overrides=tuple(overrides))
        result = run(stage, directory / stage.name, data_sets, float_checkpoint)
        assert result is not None  # stages take one machine
        results.append(result)
        if Parts(stage.config, data_sets).fake_quantization is None:
            float_checkpoint = results[-1].directory / "checkpoints" / BEST
    return results


def _write(job: Job, directory: Path, started: Mapping[str, Any], results: Sequence[Result]) -> Result:
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
        for stage, result in zip(job.config.stages, results, strict=True)
    ]
    folder = stages[-1].directory
    changes = {
        "configuration": digest_of(job.config),
        "seconds": {stage.directory: stage.seconds for stage in stages},
        "pruning": next((stage.pruning for stage in reversed(stages) if stage.pruning), None),
        "student": last.student.model_copy(
            update={
                "epochs": sum(stage.student.epochs for stage in stages),
                **stages[0].student.model_dump(include={"weights", "licence"}, exclude_unset=True),
            }
        ),
        "stages": stages,
        "rows": tuple(replace(row, file=row.file and f"{folder}/{row.file}") for row in last.rows),
    }
    record = last.model_copy(update={**started, **changes})
    title = f"{record.student.model}: {', '.join(stage.name for stage in stages)}"
    record = write_results(directory, record, title)
    (directory / resume.STARTED).unlink()
    show(directory, record, title)
    return Result(directory, record)
