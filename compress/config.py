"""Composing the configuration of each job, and everything that can be wrong with one, said before any work."""

import importlib.util
import inspect
import os
import re
from collections.abc import Sequence
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import torch
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.utils import get_class, get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from compress import models
from compress.check import check_arguments, parameter_names
from compress.errors import UserError
from compress.paths import CONF

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]

# Ranges of library targets, whose constructors do not say them. Keys that are not here pass as they are.
OPTIMIZER = {
    "lr": Positive,
    "momentum": BelowOne,
    "dampening": BelowOne,
    "weight_decay": NotNegative,
    "nesterov": bool,
    "betas": Annotated[list[BelowOne], Field(min_length=2, max_length=2)],
    "eps": Positive,
    "amsgrad": bool,
    "fused": bool | None,
}
TRAINER = {
    "max_epochs": Count,
    "accelerator": Literal["auto", "cpu", "gpu", "cuda", "mps"],
    "devices": Count | Literal["auto"],
    "gradient_clip_val": Positive | None,
    "early_stopping": Count | None,
    "log_every": Annotated[int, Field(ge=0)],
    "precision": Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"],
    "accumulate_grad_batches": Count,
}
# What the pipeline gives the Trainer itself.
TRAINER_OWN = {"logger", "callbacks", "default_root_dir", "enable_progress_bar", "enable_checkpointing", "max_steps"}
TEACHER = {
    "model": dict,
    "checkpoint": Annotated[str, Field(min_length=1)] | None,
    "mean": list[float] | None,
    "standard_deviation": list[Positive] | None,
    "training": dict,
}
TEACHER_TRAINING = {
    "epochs": Count,
    "batch_size": Count,
    "seed": Annotated[int, Field(ge=0)],
    "label_smoothing": BelowOne,
    "optimizer": dict,
    "scheduler": dict,
}
TOP_LEVEL = {"seed": Annotated[int, Field(ge=0, lt=2**32)], "output_directory": Annotated[str, Field(min_length=1)]}
GROUPS = (
    "data",
    "student",
    "teacher",
    "method",
    "loss",
    "optimizer",
    "scheduler",
    "quantizer",
    "trainer",
    "logger",
    "experiment",
)


def register() -> None:
    """Tells Hydra the roles that choose from `conf/model`, and the resolvers that the YAML files use."""
    store = ConfigStore.instance()
    for stem in models.available():
        store.store(group="student", name=stem, node={"defaults": [f"/model/{stem}@_here_", "_self_"], "stem": stem})
        store.store(
            group="teacher",
            name=stem,
            node={
                "defaults": [
                    {"/model@model": stem},
                    {"/optimizer@training.optimizer": "adamw"},
                    {"/scheduler@training.scheduler": "onecycle"},
                    "_self_",
                ],
                "model": {"stem": stem},
                "checkpoint": None,
                "mean": None,
                "standard_deviation": None,
                "training": {"epochs": 8, "batch_size": 64, "seed": 0, "label_smoothing": 0.0},
            },
        )
    store.store(group="teacher", name="none", node={})
    # The paper ramps over 20 of 240 epochs.
    OmegaConf.register_new_resolver("dkd_warmup", lambda epochs: min(20, max(1, epochs // 12)), replace=True)


def compose_jobs(overrides: Sequence[str], multirun: bool = False) -> list[tuple[list[str], DictConfig]]:
    """The overrides and the composed, checked configuration of every job of a command line.

    Raises UserError with one line for the first thing that is wrong.
    """
    register()
    for override in overrides:
        try:
            OverridesParser.create().parse_override(override)
        except HydraException:
            raise UserError(f"{override!r}: cannot be read; accepted: key=value, with key=[1,2] for a list") from None
    jobs = []
    with _hydra():
        for job in _expand(overrides) if multirun else [list(overrides)]:
            config = _compose(job)
            check(config, job)
            jobs.append((job, config))
    return jobs


def _hydra() -> Any:
    GlobalHydra.instance().clear()
    return initialize_config_dir(str(CONF), version_base="1.3")


def _expand(overrides: Sequence[str]) -> list[list[str]]:
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
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
    except (HydraException, OmegaConfBaseException) as failure:
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
        config = compose("run", overrides=others)
        node = OmegaConf.select(config, parent) if parent else config
    except (HydraException, OmegaConfBaseException):
        return _first_line(failure)
    if not isinstance(node, DictConfig):
        return f"{key}: found an unknown key; {parent or 'the configuration'} has no keys here"
    accepted = sorted(str(each) for each in node if each not in ("_target_", "_partial_", "stem"))
    return f"{key}: found an unknown key; accepted: {', '.join(accepted) or 'no keys'}"


def check(config: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Raises UserError for the first thing in `config` that could not work; `overrides` are those that were typed.

    It looks at every value, at what the parts need of each other, at the files that the run reads and at what has
    to be installed; data that are missing are downloaded here where that is possible.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    for key in plain:
        if key not in (*GROUPS, *TOP_LEVEL):
            raise UserError(f"{key}: found an unknown key; accepted: {', '.join((*GROUPS, *TOP_LEVEL))}")
    check_arguments(TOP_LEVEL, {key: plain[key] for key in TOP_LEVEL}, where="")
    for group in ("data", "method", "loss", "scheduler", "quantizer"):
        if plain[group]:
            _check_own(plain[group], group)
    _check_optimizer(plain["optimizer"], "optimizer")
    _check_model(plain["student"], "student")
    _check_trainer(plain["trainer"])
    _check_roles(plain, overrides)
    if plain["teacher"]:
        _check_teacher(plain["teacher"])
    _check_loggers(plain["logger"])
    _check_data(config)


def _check_own(node: dict[str, Any], where: str) -> None:
    target = get_object(_target(node, where))
    check_arguments(target, node, where)
    if inspect.isclass(target) and where in ("scheduler", "loss"):
        instantiate(node)


def _target(node: dict[str, Any], where: str) -> str:
    if not isinstance(node, dict) or "_target_" not in node:
        raise UserError(f"{where}: found {node!r}; accepted: one of the options of conf/{where}")
    return node["_target_"]


def _check_optimizer(node: dict[str, Any], where: str) -> None:
    target = get_class(_target(node, where))
    accepted = [name for name in parameter_names(target) if name != "params"]
    values = check_arguments(OPTIMIZER, node, where, accepted=accepted)
    try:
        target([torch.nn.Parameter(torch.zeros(1))], **values)
    except (TypeError, ValueError, RuntimeError) as failure:
        raise UserError(f"{where}: {_first_line(failure)}") from None


def _check_model(node: dict[str, Any], where: str) -> None:
    if not isinstance(node, dict) or "stem" not in node:
        raise UserError(f"{where}: found {node!r}; accepted: {', '.join(models.available())}")
    options = {key: value for key, value in node.items() if key not in ("stem", "_target_")}
    models.check_options(node["stem"], options, where)


def _check_trainer(node: dict[str, Any]) -> None:
    import pytorch_lightning as pl

    accepted = sorted({*parameter_names(pl.Trainer), "early_stopping", "log_every"} - TRAINER_OWN)
    check_arguments(TRAINER, node, "trainer", accepted=accepted)
    if node["accelerator"] in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator: found {node['accelerator']!r} but no usable GPU; accepted here: cpu, auto"
        )


def _check_roles(plain: dict[str, Any], overrides: Sequence[str]) -> None:
    method = get_class(plain["method"]["_target_"])
    takes_teacher = "teacher" in parameter_names(method)
    typed = next((each for each in overrides if re.match(r"\+{0,2}teacher[.=]", each)), None)
    if typed and not takes_teacher and not re.fullmatch(r"teacher=none", typed):
        raise UserError(f"teacher: found {typed!r}, but this method uses no teacher; accepted: none")
    if takes_teacher and not plain["teacher"]:
        choices = ", ".join(models.available())
        raise UserError(f"teacher: found none, but this method learns from one; accepted: {choices}")
    needs_teacher = get_class(plain["loss"]["_target_"]).needs_teacher
    if needs_teacher and not takes_teacher:
        raise UserError(
            "loss: found one that compares with a teacher, which this method has not; accepted: cross_entropy"
        )
    if takes_teacher and not needs_teacher:
        raise UserError(
            "loss: found cross_entropy, which ignores the teacher; accepted: kd, dkd (or method=supervised)"
        )


def _check_teacher(node: dict[str, Any]) -> None:
    check_arguments(TEACHER, node, "teacher")
    check_arguments(TEACHER_TRAINING, node["training"], "teacher.training")
    _check_model(node["model"], "teacher.model")
    _check_optimizer(node["training"]["optimizer"], "teacher.training.optimizer")
    _check_own(node["training"]["scheduler"], "teacher.training.scheduler")
    for key in ("mean", "standard_deviation"):
        if node[key] is not None and len(node[key]) not in (1, 3):
            raise UserError(f"teacher.{key}: found {len(node[key])} values; accepted: 1 or 3")
    if (node["mean"] is None) != (node["standard_deviation"] is None):
        raise UserError("teacher.mean: found only one of mean and standard_deviation; accepted: both or neither")


def _check_loggers(node: dict[str, Any]) -> None:
    for name, logger in node.items():
        target = get_class(_target(logger, f"logger.{name}"))
        accepted = [each for each in parameter_names(target) if each != "save_dir"]
        check_arguments(
            {}, logger, f"logger.{name}", accepted=accepted if "WandbLogger" not in str(target) else [*logger]
        )
    if "tensorboard" in node and importlib.util.find_spec("tensorboard") is None:
        raise UserError("logger: found tensorboard, which is not installed; pip install 'compress[tensorboard]'")
    if "wandb" in node:
        _check_wandb(node["wandb"])


def _check_wandb(node: dict[str, Any]) -> None:
    offline = node.get("offline") or os.environ.get("WANDB_MODE") in ("offline", "disabled")
    if not offline and not _has_wandb_key():
        raise UserError(
            "logger: found wandb without an API key; accepted: logger.wandb.offline=true, WANDB_API_KEY or wandb login"
        )


def _has_wandb_key() -> bool:
    """W&B itself asks for a key only when the first run starts, after everything has been built."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc(os.environ.get("NETRC", Path.home() / ".netrc")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def _check_data(config: DictConfig) -> None:
    """Reads the data once, so that a wrong file, class count or batch size is found now and not after the teacher."""
    data = instantiate(config.data)
    data.prepare_data()
    data.setup()
    if config.teacher and config.teacher.checkpoint:
        node = OmegaConf.to_container(config.teacher.model)
        teacher = models.build(num_classes=data.num_classes, **node)
        models.load_weights(teacher, Path(config.teacher.checkpoint), where="teacher.checkpoint")


def method_name(config: DictConfig) -> str:
    """The method's module name, which is also its word on the command line."""
    return config.method._target_.rpartition(".")[0].rpartition(".")[2]


def apply_override(config: DictConfig, override: str) -> None:
    """Sets one typed `key=value` in a configuration read from a run directory. Raises UserError for an unknown key."""
    try:
        parsed = OverridesParser.create().parse_override(override)
        OmegaConf.update(config, parsed.key_or_group, parsed.value(), force_add=parsed.is_add())
    except (HydraException, OmegaConfBaseException) as failure:
        raise UserError(f"{override}: {_first_line(failure)}") from None
