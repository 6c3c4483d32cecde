"""Checks of the groups, the keys beside them, the stages and `trainer.*` of a composed configuration.

Nothing here imports PyTorch, so that what is wrong with one of them is said at once.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from compress.arguments import check_arguments, plain
from compress.config.ranges import STAGE, TOP_LEVEL, TRAINER, TRAINER_REFUSED, TRAINER_REQUIRED
from compress.errors import UserError
from compress.paths import CONF

# In the order of conf/run.yaml, which chooses an option of each.
GROUPS = tuple(next(iter(entry)) for entry in OmegaConf.load(CONF / "run.yaml").defaults if entry != "_self_")


def check_run_values(config: DictConfig) -> None:
    """Replaces each of these values by what its annotation makes of it. Raises UserError for the first wrong one."""
    _check_groups(config)
    coerce(config, "", TOP_LEVEL, accepted=[*TOP_LEVEL, *GROUPS], required=TOP_LEVEL)
    _check_stages(config)
    for key in config.trainer.keys() & TRAINER_REFUSED.keys():
        why, instead = TRAINER_REFUSED[key]
        raise UserError(f"trainer.{key}: found {config.trainer[key]!r}, {why}; accepted: {instead}")
    coerce(config, "trainer", TRAINER, accepted=sorted(TRAINER), required=TRAINER_REQUIRED)


def coerce(
    config: DictConfig,
    where: str,
    receiver: Any,
    accepted: Collection[str] | None = None,
    required: Collection[str] = (),
) -> dict[str, Any]:
    """The values of the node `where` as `receiver` takes them, which also take their place in `config`.

    accepted: the keys that may be there, all of the receiver's by default; required: those that have to be. Raises
    UserError for the first that is wrong.
    """
    node = OmegaConf.select(config, where) if where else config
    for key in required:
        if key not in node:
            raise UserError(
                f"{where}.{key}: found no such key; accepted: a configuration that has it".removeprefix(".")
            )
    values = check_arguments(receiver, plain(node), where, accepted=accepted)
    with open_dict(config):
        for key, value in values.items():
            if is_dataclass(value) and not isinstance(value, type):
                node[key].update(asdict(value))
            elif not isinstance(value, Mapping):
                node[key] = value
    return values


def _check_groups(config: DictConfig) -> None:
    for key in map(str, config):
        if key not in (*GROUPS, *TOP_LEVEL):
            raise UserError(f"{key}: found an unknown key; accepted: {', '.join((*GROUPS, *TOP_LEVEL))}")
    for key in GROUPS:
        # An experiment spreads over the other groups and leaves nothing of its own.
        if key != "experiment" and not isinstance(config.get(key), DictConfig):
            raise UserError(f"{key}: found {config.get(key)!r}; accepted: {key}=OPTION, see --help")
    for group in ("quantizer", "mixup", "pruning"):
        # `none` on the command line leaves what an experiment says of the option that it chose itself.
        if config[group] and "_target_" not in config[group]:
            config[group] = {}
    if config.teacher and not {"model", "members"} & config.teacher.keys():
        config.teacher = {}


def _check_stages(config: DictConfig) -> None:
    stages: Any = OmegaConf.to_container(config.stages, resolve=True)
    for index, stage in enumerate(stages):
        check_arguments(STAGE, stage, f"stages.{index}")
        missing = [key for key in ("name", "overrides") if key not in stage]
        if missing:
            raise UserError(f"stages.{index}: found no {missing[0]}; accepted: {', '.join(STAGE)}")
    if stages and config.trainer.get("num_nodes", 1) != 1:
        raise UserError(f"trainer.num_nodes: found {config.trainer.num_nodes} for a run in stages; accepted: 1")
    names = [stage["name"] for stage in stages]
    if len({*names}) < len(names):
        raise UserError(f"stages: found {', '.join(names)}; accepted: names that differ")
    shares = [stage.get("share") for stage in stages]
    if any(shares) and (None in shares or abs(sum(shares) - 1) > 1e-6):
        listed = ", ".join(map(str, shares))
        raise UserError(f"stages: found the shares {listed}; accepted: shares that sum to 1, or none at all")
    epochs = config.trainer.get("max_epochs")
    if any(shares) and isinstance(epochs, int) and epochs < len(stages):
        raise UserError(
            f"trainer.max_epochs: found {epochs} for {len(stages)} stages; accepted: at least {len(stages)}"
        )
