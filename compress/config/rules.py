"""What the parts of a configuration ask of each other, as far as the configuration alone can tell."""

import inspect
import re
from collections.abc import Sequence

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from compress import models
from compress.arguments import parameter_names
from compress.config import ensemble
from compress.errors import UserError


def check_rules(config: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Raises UserError for the first parts that do not go together; `overrides` are those that were typed."""
    _check_roles(config, overrides)
    _check_training(config)
    for where in ensemble.keys(config):
        _check_teacher(config, where)


def uses_teacher(config: DictConfig) -> bool:
    """Whether the method of `config` learns from a teacher; one that may do without does so where its loss does."""
    method = get_object(config.method._target_)
    if "teacher" not in parameter_names(method):
        return False
    parameter = inspect.signature(method).parameters.get("teacher")
    optional = parameter is not None and parameter.default is None
    return not optional or get_object(config.loss._target_).compares_with == "teacher"


def _check_roles(config: DictConfig, overrides: Sequence[str]) -> None:
    method = get_object(config.method._target_)
    takes = parameter_names(method)
    learns_from_teacher = uses_teacher(config)
    for role, used in (("teacher", learns_from_teacher), ("peer", "peers" in takes)):
        typed = next((each for each in overrides if re.match(rf"\+{{0,2}}{role}[.=]", each)), None)
        if typed and not used and typed != f"{role}=none":
            here = "method with this loss" if role in takes else "method"
            raise UserError(f"{role}: found {typed!r}, but this {here} uses no {role}; accepted: none")
    if learns_from_teacher and not config.teacher:
        choices = ", ".join((*models.available(), "ensemble"))
        raise UserError(f"teacher: found none, but this method learns from one; accepted: {choices}")
    if learns_from_teacher and ensemble.is_ensemble(config):
        if "layers" in takes:
            raise UserError(
                "teacher: found an ensemble, but this method compares features of one network; accepted: "
                + ", ".join(models.available())
            )
        if config.method.get("update_teacher"):
            raise UserError("method.update_teacher: found true for an ensemble; accepted: false, or another teacher")
    compares_with = get_object(config.loss._target_).compares_with
    if compares_with not in method.loss_compares_with:
        fitting = {None: "cross_entropy", "teacher": "kd, dkd, function_matching", "peers": "dml"}
        has = next((each for each in ("teacher", "peers") if each in takes), None)
        raise UserError(
            f"loss: found one that compares with {compares_with or 'nothing'}, but this method has "
            f"{has or 'neither teacher nor peers'}; accepted: "
            + ", ".join(words for kind, words in fitting.items() if kind in method.loss_compares_with)
        )
    has = "teacher" if learns_from_teacher else "peers" if "peers" in takes else None
    if config.mixup and config.mixup.get("teacher_sees") == "clean" and has != "teacher":
        raise UserError(
            "mixup: found one that blends the logits of a teacher, which is not there; accepted: none, images"
        )
    if config.mixup and config.mixup.get("teacher_sees") == "clean" and "layers" in takes:
        raise UserError(
            "mixup: found one that blends logits, but this method compares features; accepted: none, images"
        )
    if has == "peers" and config.trainer.gradient_clip_val is not None:
        raise UserError(
            f"trainer.gradient_clip_val: found {config.trainer.gradient_clip_val}, which Lightning cannot do for "
            "several optimizers; accepted: null"
        )


def _check_training(config: DictConfig) -> None:
    trainer = config.trainer
    if trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator: found {trainer.accelerator!r} but no usable GPU; accepted here: cpu, auto"
        )
    if trainer.gradient_clip_val is not None and trainer.precision.endswith("mixed") and config.optimizer.get("fused"):
        raise UserError(
            "optimizer.fused: found true with trainer.gradient_clip_val and mixed precision, which Lightning cannot "
            "combine; accepted: optimizer.fused=false"
        )
    if config.data.get("batch_size", 2) < 2:
        raise UserError(f"data.batch_size: found {config.data.batch_size}; accepted: a whole number of at least 2")


def _check_teacher(config: DictConfig, where: str) -> None:
    node = OmegaConf.select(config, where)
    for key in ("mean", "standard_deviation"):
        if node[key] is not None and len(node[key]) not in (1, 3):
            raise UserError(f"{where}.{key}: found {len(node[key])} values; accepted: 1 or 3")
    if (node.mean is None) != (node.standard_deviation is None):
        raise UserError(f"{where}.mean: found only one of mean and standard_deviation; accepted: both or neither")
    if node.mean is not None and node.checkpoint is None:
        raise UserError(f"{where}.mean: found one for a teacher that is trained on these data; accepted: null")
