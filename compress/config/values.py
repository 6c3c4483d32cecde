"""Every value of a composed configuration, checked against what receives it.

Constructors of this project say in their annotations what they accept; `compress.config.ranges` says it for the rest.
"""

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from compress import models
from compress.arguments import annotations, build, check_arguments, imported, plain, settable
from compress.config import ensemble
from compress.config.pretrained import take_over, take_over_teacher
from compress.config.ranges import ENSEMBLE, OPTIMIZER, STUDENT, TEACHER, TEACHER_TRAINING
from compress.config.reserved import check_reserved, check_target
from compress.config.run_values import check_run_values, coerce
from compress.errors import UserError, first_line
from compress.models import own_class
from compress.optim.groups import DECAY


def check_values(config: DictConfig) -> None:
    """Checks every value against what receives it, and puts in its place what that takes: 10 for 1e1, say.

    Raises UserError for the first one that is wrong.
    """
    check_run_values(config)
    check_reserved(config)
    take_over(config)
    for group in ("data", "method", "loss", "scheduler"):
        _coerce_part(config, group)
    for group in ("quantizer", "mixup", "pruning"):
        if config[group]:
            _coerce_part(config, group)
    for where, _ in _named_nodes(config, "export"):
        _coerce_part(config, where)
    _coerce_optimizer(config, "optimizer")
    for role in ("student", "peer"):
        if config[role]:
            _check_model(config, role)
    _check_teachers(config)
    _check_loggers(config)


def target(config: DictConfig, where: str) -> Any:
    """The class or function that the node `where` names. Raises UserError where it cannot be imported."""
    node = OmegaConf.select(config, where)
    name = node.get("_target_") if isinstance(node, DictConfig) else None
    if not isinstance(name, str):
        raise UserError(f"{where}._target_: found {name!r}; accepted: the name of a class, as in the options of --help")
    return imported(name, where)


def _check_teachers(config: DictConfig) -> None:
    if config.teacher and ensemble.is_ensemble(config):
        coerce(config, "teacher", ENSEMBLE, required=ENSEMBLE)
        _coerce_training(config, "teacher.training")
        ensemble.complete_members(config)
    for where in ensemble.keys(config):
        # A run from before there was a choice of these does not name them.
        coerce(config, where, TEACHER, required=[key for key in TEACHER if key not in ("classes", "pretrained")])
        take_over_teacher(config, where)
        _coerce_training(config, f"{where}.training")
        _check_model(config, f"{where}.model")


def _named_nodes(config: DictConfig, group: str) -> Iterator[tuple[str, DictConfig]]:
    """The key and the node of each part of a `group` that may have several."""
    for name, node in config[group].items():
        where = f"{group}.{name}"
        if not isinstance(node, DictConfig):
            accepted = f"its keys, such as {where}.KEY=VALUE, or {group}=OPTION"
            raise UserError(f"{where}: found {node!r}; accepted: {accepted}")
        yield where, node


def _check_loggers(config: DictConfig) -> None:
    """A logger that needs more than its arguments says so in `check`."""
    for where, node in _named_nodes(config, "logger"):
        logger = target(config, where)
        accepted = [key for key in annotations(logger) if key != "save_dir"]
        checked = check_arguments(logger if _is_ours(logger) else {}, node, where, accepted=accepted)
        if hasattr(logger, "check"):
            logger.check(checked)


def _is_ours(part: Any) -> bool:
    return getattr(part, "__module__", "").startswith("compress.")


def _coerce_training(config: DictConfig, where: str) -> None:
    coerce(config, where, TEACHER_TRAINING, required=TEACHER_TRAINING)
    _coerce_optimizer(config, f"{where}.optimizer")
    _coerce_part(config, f"{where}.scheduler")


def _coerce_part(config: DictConfig, where: str) -> None:
    part = target(config, where)
    coerce(config, where, part, accepted=settable(part))
    if is_dataclass(part):
        build(OmegaConf.select(config, where), where)


def _coerce_optimizer(config: DictConfig, where: str) -> None:
    optimizer = target(config, where)
    accepted = [name for name in annotations(optimizer) if name not in ("params", "defaults")] + [DECAY]
    values = coerce(config, where, optimizer if _is_ours(optimizer) else OPTIMIZER, accepted=accepted)
    decays = values.pop(DECAY, True)
    if not isinstance(decays, bool):
        raise UserError(f"{where}.{DECAY}: found {decays!r}; accepted: true or false")
    try:
        optimizer([torch.nn.Parameter(torch.zeros(1))], **values)
    except (ImportError, TypeError, ValueError, RuntimeError) as failure:
        raise UserError(f"{where}: {first_line(failure)}") from None


def _check_model(config: DictConfig, where: str) -> None:
    node = OmegaConf.select(config, where)
    if not isinstance(node, DictConfig) or "stem" not in node:
        raise UserError(f"{where}: found {node!r}; accepted: {', '.join(models.available())}")
    options = plain(node)
    if isinstance(options["stem"], str):
        check_target(options, where)
    stem = options.pop("stem")
    if where == "student":
        # A run from before there was a choice of these does not name them.
        check_arguments(STUDENT, {key: options.pop(key) for key in STUDENT if key in options}, where)
    values = models.check_options(stem, options, where)
    if models.names_class(stem):
        own_class.check(values, where)
    with open_dict(config):
        for key in options.keys() & values.keys():
            node[key] = values[key]
