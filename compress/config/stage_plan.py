"""The jobs of a run in stages: each is composed from what was typed and from its own overrides."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, open_dict

from compress.config.compose import Job, compose_job, initialized, parse
from compress.errors import UserError

# What is typed about all stages together.
ABOUT_ALL_STAGES = ("stages", "trainer.max_epochs")


def stage_directories(config: DictConfig) -> list[str]:
    """The sub-directories of the stages, in order."""
    return [f"{number}-{stage.name}" for number, stage in enumerate(config.stages, 1)]


def compose_stages(job: Job) -> tuple[Job, ...]:
    """The job of every stage of a `job` whose values were checked.

    A stage is composed from the overrides of the job and from its own. Where both choose the same option the stage's
    counts: what was typed about that option is left out. Raises UserError for an override that no stage takes.
    """
    keys = {override: parse(override).key_or_group for override in job.overrides}
    taken: set[str] = set()
    stages = []
    with initialized():
        plan = zip(stage_directories(job.config), job.config.stages, _epochs(job.config), strict=True)
        for name, stage, epochs in plan:
            fixed = [*stage.overrides, "stages=[]"]
            if epochs is not None:
                fixed.append(f"trainer.max_epochs={epochs}")
            try:
                chosen = tuple(f"{parse(override).key_or_group}." for override in fixed)
                typed = [override for override, key in keys.items() if not f"{key}.".startswith(chosen)]
                composed = compose_job([*typed, *fixed])
            except UserError as mistake:
                raise UserError(f"stage {name}: {mistake}") from None
            taken.update(typed)
            stages.append(Job((), composed.config, name=name, networks=job.networks))
    ignored = [override for override, key in keys.items() if override not in taken and key not in ABOUT_ALL_STAGES]
    if ignored:
        raise UserError(f"{ignored[0]}: found it where every stage chooses this itself; accepted: to leave it out")
    return tuple(stages)


def start_from(stage: DictConfig, checkpoint: Path) -> None:
    """Lets a `stage` start from the `checkpoint` of the one before."""
    with open_dict(stage):
        stage.student.update({"checkpoint": str(checkpoint.absolute()), "head": "keep", "pretrained": False})


def _epochs(config: DictConfig) -> Sequence[int | None]:
    """The epochs of each stage: its share of all, by the largest remainders, and at least one; None without shares."""
    shares = [stage.get("share") for stage in config.stages]
    if not any(shares):
        return shares
    spare = config.trainer.max_epochs - len(shares)
    exact = [max(share * config.trainer.max_epochs - 1, 0) for share in shares]
    exact = [value * spare / max(sum(exact), 1e-9) for value in exact]
    epochs = [1 + int(value) for value in exact]
    order = sorted(range(len(shares)), key=lambda index: (int(exact[index]) - exact[index], index))
    for index in order[: config.trainer.max_epochs - sum(epochs)]:
        epochs[index] += 1
    return epochs
