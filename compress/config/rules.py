"""What the parts of a configuration ask of each other, as far as the configuration alone can tell."""

import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from compress import models, yaml_file
from compress.config import ensemble
from compress.errors import UserError
from compress.methods.classifier import Classifier
from compress.paths import option_files

ROLES = {"teacher": "a teacher", "peers": "peers", None: "neither teacher nor peers"}


def method_of(config: DictConfig) -> type[Classifier]:
    """The class of the method that `config` chooses."""
    return get_class(config.method._target_)


def compares_with(loss: DictConfig) -> str | None:
    """What the loss of a node compares logits with beside the labels: "teacher", "peers" or nothing."""
    target: Any = get_class(loss._target_)
    reference: str | None = target.compares_with
    return reference


def uses_teacher(config: DictConfig) -> bool:
    """Whether the method needs a teacher, or its loss compares with one."""
    method = method_of(config)
    return "teacher" in method.needs or "teacher" in method.loss_compares_with & {compares_with(config.loss)}


def uses_peers(config: DictConfig) -> bool:
    """Whether the student trains among peers."""
    return "peers" in method_of(config).needs


def check_rules(config: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Raises UserError for the first parts of `config` that do not go together.

    A teacher or peer that nothing uses is refused only where it is among the typed `overrides`: an experiment may
    name one for those of its methods that do.
    """
    _refuse_unused_roles(config, overrides)
    if config.student.get("head") == "new" and config.student.checkpoint is None:
        raise UserError("student.head: found new without a student.checkpoint; accepted: keep, or a checkpoint")
    _check_teacher(config)
    _check_loss(config)
    _check_mixup(config)
    _check_teacher_cache(config)
    if uses_peers(config):
        for key, neutral in (("gradient_clip_val", None), ("accumulate_grad_batches", 1)):
            if (value := config.trainer.get(key, neutral)) != neutral:
                raise UserError(
                    f"trainer.{key}: found {value}, which Lightning cannot do for several optimizers; accepted: "
                    f"{'null' if neutral is None else neutral}"
                )
        if not config.peer and config.student.get("from_python"):
            raise UserError(
                "student: found a network from Python, which cannot be drawn anew as a peer; accepted: peer=STEM"
            )
    _check_training(config)
    for where in ensemble.keys(config):
        _check_foreign_teacher(config, where)


def _refuse_unused_roles(config: DictConfig, overrides: Sequence[str]) -> None:
    may_use_teacher = "teacher" in method_of(config).loss_compares_with
    for role, used in (("teacher", uses_teacher(config)), ("peer", uses_peers(config))):
        typed = [override for override in overrides if override.lstrip("+").startswith((f"{role}=", f"{role}."))]
        if typed and not used and typed[0] != f"{role}=none":
            subject = "method with this loss" if role == "teacher" and may_use_teacher else "method"
            raise UserError(f"{role}: found {typed[0]!r}, but this {subject} uses no {role}; accepted: none")


def _check_teacher(config: DictConfig) -> None:
    if not uses_teacher(config):
        return
    if not config.teacher:
        choices = ", ".join((*models.available(), "ensemble"))
        raise UserError(f"teacher: found none, but this method learns from one; accepted: {choices}")
    if not ensemble.is_ensemble(config):
        return
    method = method_of(config)
    if "features" in method.needs:
        accepted = ", ".join(models.available())
        raise UserError(
            f"teacher: found an ensemble, but this method compares features of one network; accepted: {accepted}"
        )
    if method.updates_teacher(config.method):
        raise UserError("method.update_teacher: found true for an ensemble; accepted: false, or another teacher")


def _check_loss(config: DictConfig) -> None:
    method, reference = method_of(config), compares_with(config.loss)
    if reference in method.loss_compares_with:
        return
    role = next((role for role in ("teacher", "peers") if role in method.needs | method.loss_compares_with), None)
    raise UserError(
        f"loss: found one that compares with {reference or 'nothing'}, but this method has {ROLES[role]}; "
        f"accepted: {', '.join(_losses(method.loss_compares_with))}"
    )


def _losses(references: Iterable[str | None]) -> list[str]:
    """The options of `loss` that compare with one of `references`."""
    fitting = []
    for stem, file in option_files("loss").items():
        # One of the user's may take its `_target_` from another, or one that cannot be imported.
        with suppress(
            OmegaConfBaseException, HydraException, UserError, YAMLError, ImportError, AttributeError, ValueError
        ):
            yaml_file.check_file(file)
            loss = OmegaConf.load(file)
            if isinstance(loss, DictConfig) and compares_with(loss) in references:
                fitting.append(stem)
    return fitting


def _check_mixup(config: DictConfig) -> None:
    if not config.mixup or config.mixup.get("teacher_sees") != "clean":
        return
    if not uses_teacher(config):
        raise UserError(
            "mixup: found one that blends the logits of a teacher, which is not there; accepted: none, images"
        )
    if "features" in method_of(config).needs:
        raise UserError(
            "mixup: found one that blends logits, but this method compares features; accepted: none, images"
        )


def _check_teacher_cache(config: DictConfig) -> None:
    views = config.method.get("teacher_cache")
    if not isinstance(views, int):
        return
    problems = {
        "without a teacher": not uses_teacher(config),
        "for a teacher that learns": method_of(config).updates_teacher(config.method),
        "for a teacher that sees blended images": config.mixup and config.mixup.get("teacher_sees") != "clean",
    }
    for problem in (problem for problem, present in problems.items() if present):
        raise UserError(f"method.teacher_cache: found {views} {problem}; accepted: auto, null")


def _check_compiling(config: DictConfig) -> None:
    if "features" in method_of(config).needs:
        raise UserError(
            "trainer.compile: found true, but this method reads features inside the networks; accepted: false"
        )
    on_cpu = config.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    if on_cpu and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UserError("trainer.compile: found true, but no C++ compiler; accepted: false, or CXX=COMPILER")


def _check_training(config: DictConfig) -> None:
    trainer = config.trainer
    if trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator: found {trainer.accelerator!r} but no usable GPU; accepted here: cpu, auto"
        )
    if trainer.accelerator == "cpu" or not torch.cuda.is_available():
        for where in ("trainer", *(f"{key}.training" for key in ensemble.keys(config))):
            if OmegaConf.select(config, f"{where}.precision") == "16-mixed":
                raise UserError(
                    f"{where}.precision: found '16-mixed', which needs a GPU; accepted here: bf16-mixed, 32-true"
                )
    if trainer.get("compile"):
        _check_compiling(config)
    if trainer.get("gradient_clip_algorithm") is not None and trainer.gradient_clip_val is None:
        raise UserError(
            f"trainer.gradient_clip_algorithm: found {trainer.gradient_clip_algorithm!r} without "
            "trainer.gradient_clip_val; accepted: both, or neither"
        )
    if trainer.get("deterministic") and trainer.get("benchmark"):
        raise UserError("trainer.benchmark: found true with trainer.deterministic; accepted: one of the two")
    if trainer.gradient_clip_val is not None and trainer.precision.endswith("mixed") and config.optimizer.get("fused"):
        raise UserError(
            "optimizer.fused: found true with trainer.gradient_clip_val and mixed precision, which Lightning cannot "
            "combine; accepted: optimizer.fused=false"
        )
    if config.data.get("batch_size", 2) < 2:
        raise UserError(f"data.batch_size: found {config.data.batch_size}; accepted: a whole number of at least 2")


def _check_foreign_teacher(config: DictConfig, where: str) -> None:
    node = OmegaConf.select(config, where)
    if node.get("classes") is not None and node.checkpoint is None:
        raise UserError(f"{where}.classes: found some without {where}.checkpoint; accepted: null, or a checkpoint")
    for key in ("mean", "standard_deviation"):
        if node[key] is not None and len(node[key]) not in (1, 3):
            raise UserError(f"{where}.{key}: found {len(node[key])} values; accepted: 1 or 3")
    if (node.mean is None) != (node.standard_deviation is None):
        raise UserError(f"{where}.mean: found only one of mean and standard_deviation; accepted: both or neither")
    if node.mean is not None and node.checkpoint is None and not node.model.get("from_python"):
        raise UserError(f"{where}.mean: found one for a teacher that is trained on these data; accepted: null")
