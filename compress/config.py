"""Composing the configuration of each job, and saying in one line why one cannot be composed."""

import re
from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from compress import models
from compress.checks import GROUPS, check
from compress.errors import UserError
from compress.paths import CONF

# How a teacher is trained where none has been yet.
TRAINING = {"epochs": 8, "batch_size": 64, "seed": 0, "precision": "32-true", "label_smoothing": 0.0}


def register() -> None:
    """Tells Hydra the roles that choose from `conf/model`, and the resolvers that the YAML files use."""
    store = ConfigStore.instance()
    trained = [{"/optimizer@training.optimizer": "adamw"}, {"/scheduler@training.scheduler": "onecycle"}, "_self_"]
    for stem in models.available():
        for role in ("student", "peer"):
            store.store(group=role, name=stem, node={"defaults": [f"/model/{stem}@_here_", "_self_"], "stem": stem})
        store.store(
            group="teacher",
            name=stem,
            node={
                "defaults": [{"/model@model": stem}, *trained],
                "model": {"stem": stem},
                "checkpoint": None,
                "mean": None,
                "standard_deviation": None,
                "training": TRAINING,
            },
        )
    store.store(group="teacher", name="ensemble", node={"defaults": trained, "members": [], "training": TRAINING})
    for role in ("teacher", "peer"):
        store.store(group=role, name="none", node={})
    OmegaConf.register_new_resolver("when", lambda condition, yes, no: yes if condition else no, replace=True)
    # The paper ramps over 20 of 240 epochs.
    OmegaConf.register_new_resolver("dkd_warmup", _warmup, replace=True)


def _warmup(epochs: object) -> int:
    """What is no number is left to the check of `trainer.max_epochs`."""
    return min(20, max(1, int(epochs) // 12)) if isinstance(epochs, int | float) else 1


def compose_jobs(
    overrides: Sequence[str], multirun: bool = False, checked: bool = True
) -> list[tuple[list[str], DictConfig]]:
    """The overrides and the composed configuration of every job of a command line; `checked`: its values too.

    Raises UserError with one line for the first thing that is wrong.
    """
    register()
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
        except HydraException:
            raise UserError(f"{override!r}: cannot be read; accepted: key=value, with key=[1,2] for a list") from None
        if parsed.key_or_group in GROUPS and not parsed.is_delete() and parsed.value() is None:
            raise UserError(f"{parsed.key_or_group}: found null; accepted: one of its options, see --help")
    jobs = []
    with initialize():
        for job in _expand(overrides) if multirun else [list(overrides)]:
            config = _compose(job)
            if checked:
                check(config, job)
            jobs.append((job, config))
    return jobs


def initialize() -> Any:
    """The context in which Hydra composes from `conf/`."""
    Plugins.instance()
    launchers = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    for path in (CONF / "hydra" / "launcher").glob("*.yaml"):
        # Hydra would take the node of a published plugin of that name for the schema of ours.
        launchers.pop(path.name, None)
    GlobalHydra.instance().clear()
    return initialize_config_dir(str(CONF), version_base="1.3")


def _expand(overrides: Sequence[str]) -> list[list[str]]:
    try:
        loader = GlobalHydra.instance().config_loader()  # knows the options that glob(*) stands for
        parsed = OverridesParser.create(loader).parse_overrides(list(overrides))
        return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
    except HydraException as failure:
        raise UserError(_first_line(failure)) from None


def _compose(overrides: list[str]) -> DictConfig:
    try:
        config = compose("run", overrides=overrides)
        OmegaConf.resolve(config)
        missing = OmegaConf.missing_keys(config)
    except MissingConfigException as failure:
        group, _, name = str(failure.missing_cfg_file).rpartition("/")
        options = ", ".join(failure.options or [])
        raise UserError(f"{group}: found {name!r}; accepted: {options}") from None
    except ConfigCompositionException as failure:
        raise UserError(_unknown_key(failure, overrides)) from None
    except (HydraException, OmegaConfBaseException, ValueError) as failure:
        raise UserError(_first_line(failure)) from None
    if missing:
        raise UserError(f"{min(missing)}: found no value; accepted: {min(missing)}=VALUE")
    return config


def _first_line(failure: Exception) -> str:
    return next((line.strip() for line in str(failure).splitlines() if line.strip()), type(failure).__name__)


def _unknown_key(failure: ConfigCompositionException, overrides: list[str]) -> str:
    """Hydra says what it could not override; this says what it could."""
    match = re.search(r"Could not \w+(?: \w+)? '([^']+)'", str(failure))
    if match is None:
        return _first_line(failure)
    key = match[1].lstrip("+~")
    others = [override for override in overrides if override.split("=")[0].lstrip("+~") != key]
    parent, _, name = key.rpartition(".")
    if len(others) == len(overrides) or (name in GROUPS and not parent):
        return _first_line(failure)
    try:
        config = compose("run", overrides=others, return_hydra_config=True)
        node = OmegaConf.select(config, parent) if parent else config
    except (HydraException, OmegaConfBaseException):
        return _first_line(failure)
    if not isinstance(node, DictConfig):
        return f"{key}: found an unknown key; {parent or 'the configuration'} has no keys here"
    accepted = sorted(str(each) for each in node if each not in ("_target_", "_partial_", "stem", "hydra"))
    return f"{key}: found an unknown key; accepted: {', '.join(accepted) or 'no keys'}"


def method_name(config: DictConfig) -> str:
    """The method's module name, which is also its word on the command line."""
    return config.method._target_.rpartition(".")[0].rpartition(".")[2]


def apply_override(config: DictConfig, override: str) -> None:
    """Sets one typed `key=value` in a configuration read from a run directory. Raises UserError for an unknown key."""
    try:
        parsed = OverridesParser.create().parse_override(override)
        OmegaConf.update(config, parsed.key_or_group, parsed.value())
    except (HydraException, OmegaConfBaseException) as failure:
        raise UserError(f"{override}: {_first_line(failure)}") from None
