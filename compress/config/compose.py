"""Composing the configuration of each job, and saying in one line why one cannot be composed."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from compress import models
from compress.errors import UserError
from compress.paths import CONF

GROUPS = (
    "data",
    "student",
    "teacher",
    "peer",
    "mixup",
    "pruning",
    "method",
    "loss",
    "optimizer",
    "scheduler",
    "quantizer",
    "export",
    "trainer",
    "logger",
    "experiment",
)
# Groups of one part each; a model's stem belongs to its own node.
WITH_STEM = ("data", "mixup", "pruning", "method", "loss", "optimizer", "scheduler", "quantizer", "trainer")
# What is typed about all stages together.
OF_THE_WHOLE = ("stages", "trainer.max_epochs")
# How a teacher is trained where none has been yet.
TRAINING = {"epochs": 8, "batch_size": 64, "seed": 0, "precision": "32-true", "label_smoothing": 0.0}


def register() -> None:
    """Tells Hydra the roles that choose from `conf/model`, and the resolvers that the YAML files use."""
    store = ConfigStore.instance()
    trained = [{"/optimizer@training.optimizer": "adamw"}, {"/scheduler@training.scheduler": "onecycle"}, "_self_"]
    for stem in models.available():
        for role, own in (("student", {"checkpoint": None}), ("peer", {})):
            defaults = [f"/model/{stem}@_here_", "_self_"]
            store.store(group=role, name=stem, node={"defaults": defaults, "stem": stem, **own})
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
    overrides: Sequence[str], multirun: bool = False, check: Callable[[DictConfig, list[str]], object] | None = None
) -> list[tuple[list[str], DictConfig]]:
    """The overrides and the composed configuration of every job of a command line, each handed to `check`.

    Raises UserError with one line for the first thing that is wrong.
    """
    register()
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
        except HydraException:
            raise UserError(
                f"{override!r}: cannot be read; accepted: key=value, with key=[1,2] for a list and quotes around text "
                "with commas, brackets or equals signs, key=['a=b']"
            ) from None
        if parsed.is_sweep_override() and not multirun:
            raise UserError(
                f"{parsed.key_or_group}: found several values, {parsed.input_line.partition('=')[2]}; accepted: one, "
                "with quotes where a comma is part of it, or -m for a run of each"
            )
        if parsed.key_or_group in GROUPS and not parsed.is_delete() and parsed.value() is None:
            raise UserError(f"{parsed.key_or_group}: found null; accepted: one of its options, see --help")
    jobs = []
    with initialize():
        for job in _expand(_with_grid(overrides)) if multirun else [list(overrides)]:
            config = _compose(job)
            if check is not None:
                check(config, job)
            jobs.append((job, config))
    return jobs


def initialize() -> Any:
    """The context in which Hydra composes from `conf/`, whatever it was initialized for before."""
    Plugins.instance()
    launchers = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    for path in (CONF / "hydra" / "launcher").glob("*.yaml"):
        # Hydra would take the node of a published plugin of that name for the schema of ours.
        launchers.pop(path.name, None)
    GlobalHydra.instance().clear()
    return initialize_config_dir(str(CONF), version_base="1.3")


def _with_grid(overrides: Sequence[str]) -> list[str]:
    """The `overrides` of a sweep, and the values of `grid` in its configuration for the keys that are not typed."""
    first = _compose(_expand(overrides)[0])
    typed = {override.partition("=")[0].lstrip("+") for override in overrides}
    return [*overrides, *(f"{key}={values}" for key, values in first.grid.items() if key not in typed)]


def stage_directories(config: DictConfig) -> list[str]:
    """The sub-directories of the stages, in order."""
    return [f"{number}-{stage.name}" for number, stage in enumerate(config.stages, 1)]


def compose_stages(config: DictConfig, overrides: Sequence[str]) -> list[tuple[str, DictConfig]]:
    """The sub-directory and the configuration of every stage of a `config` that was composed from `overrides`.

    A stage is composed from these and its own, which come first where both choose the same: what was typed about an
    option that the stage chooses itself is not heeded there. Raises UserError for one that no stage heeds.
    """
    parse = OverridesParser.create().parse_override
    keys = {override: parse(override).key_or_group for override in overrides}
    heeded: set[str] = set()
    composed = []
    # Within a job, or while a command line is checked, Hydra is there already.
    with nullcontext() if GlobalHydra.instance().is_initialized() else initialize():
        for name, stage, epochs in zip(stage_directories(config), config.stages, _epochs(config), strict=True):
            own = [*stage.overrides, "stages=[]"]
            if epochs is not None:
                own.append(f"trainer.max_epochs={epochs}")
            chosen = tuple(f"{_parsed_key(override, name)}." for override in own)
            typed = [override for override, key in keys.items() if not f"{key}.".startswith(chosen)]
            heeded.update(typed)
            try:
                composed.append((name, _compose([*typed, *own])))
            except UserError as mistake:
                raise UserError(f"stage {name}: {mistake}") from None
    ignored = [override for override, key in keys.items() if override not in heeded and key not in OF_THE_WHOLE]
    if ignored:
        raise UserError(f"{ignored[0]}: found it where every stage chooses this itself; accepted: to leave it out")
    return composed


def _parsed_key(override: str, stage: str) -> str:
    try:
        return OverridesParser.create().parse_override(override).key_or_group
    except HydraException:
        raise UserError(f"stage {stage}: found {override!r}; accepted: key=value") from None


def _epochs(config: DictConfig) -> list[int | None]:
    """The epochs of each stage: its share of all, by the largest remainders, and at least one; None without shares."""
    shares = [stage.get("share") for stage in config.stages]
    if not any(shares):
        return shares
    spare = config.trainer.max_epochs - len(shares)
    exact = [max(share * config.trainer.max_epochs - 1, 0) for share in shares]
    exact = [each * spare / max(sum(exact), 1e-9) for each in exact]
    epochs = [1 + int(each) for each in exact]
    order = sorted(range(len(shares)), key=lambda index: (int(exact[index]) - exact[index], index))
    for index in order[: config.trainer.max_epochs - sum(epochs)]:
        epochs[index] += 1
    return epochs


def _expand(overrides: Sequence[str]) -> list[list[str]]:
    try:
        loader = GlobalHydra.instance().config_loader()  # knows the options that glob(*) stands for
        parsed = OverridesParser.create(loader).parse_overrides(list(overrides))
        return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
    except HydraException as failure:
        raise UserError(_first_line(failure)) from None


def _compose(overrides: list[str]) -> DictConfig:
    try:
        config = compose("run", overrides=overrides, return_hydra_config=True)
        choices = config.hydra.runtime.choices
        with flag_override(config, ["struct", "readonly"], False):
            del config["hydra"]
        add_stems(config, choices)
        OmegaConf.resolve(config)
        missing = OmegaConf.missing_keys(config)
    except MissingConfigException as failure:
        group, _, name = str(failure.missing_cfg_file).rpartition("/")
        # Hydra names them for a single option alone, not for one of a list.
        options = ", ".join(failure.options or sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        raise UserError(f"{group}: found {name!r}; accepted: {options}") from None
    except ConfigCompositionException as failure:
        raise UserError(_unknown_key(failure, overrides)) from None
    except (HydraException, OmegaConfBaseException, ValueError) as failure:
        raise UserError(_first_line(failure)) from None
    if missing:
        raise UserError(f"{min(missing)}: found no value; accepted: {min(missing)}=VALUE")
    return config


def add_stems(config: DictConfig, choices: Mapping[str, str]) -> None:
    """Writes into the node of each part, as its `stem`, the option that Hydra's `choices` name for its group."""
    for group in WITH_STEM:
        node = config.get(group)
        if node and isinstance(node, DictConfig):
            if "stem" in node:
                raise UserError(f"{group}.stem: found {node.stem!r}; accepted: no such key, it is set to the option")
            with flag_override(node, "struct", False):
                node.stem = choices[group]


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
    """The word that chooses the method on the command line."""
    return config.method.stem


def apply_override(config: DictConfig, override: str) -> None:
    """Sets one typed `key=value` in a configuration read from a run directory. Raises UserError for an unknown key."""
    try:
        parsed = OverridesParser.create().parse_override(override)
        OmegaConf.update(config, parsed.key_or_group, parsed.value())
    except (HydraException, OmegaConfBaseException) as failure:
        raise UserError(f"{override}: {_first_line(failure)}") from None


def read_config(directory: Path, where: str = "resume") -> DictConfig:
    """The configuration of the run in `directory`. Raises UserError where there is none or it cannot be read."""
    path = directory / "config.yaml"
    accepted = "accepted: the directory of a run, or latest"
    if not path.is_file() and (directory / "sweep.yaml").is_file():
        raise UserError(f"{where}: found {directory}, the directory of a sweep; accepted: sweep={directory}")
    if not path.is_file():
        raise UserError(f"{where}: found no {path}; {accepted}")
    register()
    try:
        config = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException):
        raise UserError(f"{where}: found {path}, which cannot be read as YAML; {accepted}") from None
    if not isinstance(config, DictConfig) or not {"method", "student", "data", "trainer"} <= config.keys():
        raise UserError(f"{where}: found {path}, which is no configuration of a run; {accepted}")
    OmegaConf.set_struct(config, True)
    return config
