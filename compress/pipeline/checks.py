"""Everything that can be wrong with a composed configuration, said in one line before any work is done.

Constructors of this project say in their annotations what they accept; the tables here say it for those of libraries.
"""

import inspect
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import partial
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from pydantic import Field
from pytorch_lightning.loggers import WandbLogger
from torch import nn

from compress import models
from compress.arguments import build, check_arguments, parameter_names
from compress.config import ensemble
from compress.config.compose import GROUPS, compose_jobs, compose_stages
from compress.errors import UserError
from compress.export.packed import file_bytes
from compress.export.weights import build_network, load_weights
from compress.models import masks
from compress.optim.groups import DECAY
from compress.pipeline import teachers
from compress.pipeline.variants import describe
from compress.quantization import Quantizer
from compress.training import processes

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
BatchSize = Annotated[int, Field(ge=2)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Text = Annotated[str, Field(min_length=1)]

TOP_LEVEL = {"seed": Seed, "output_directory": Text, "stages": list[dict], "grid": dict[str, str]}
STAGE = {
    "name": Annotated[str, Field(pattern=r"^\w[\w-]*$")],
    "share": Annotated[float, Field(gt=0, le=1)] | None,
    "overrides": list[str],
}
EXPORT = {"packed": bool, "onnx": bool}
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
    "accelerator": Literal["auto", "cpu", "gpu", "cuda"],
    "devices": Count | Literal["auto"],
    "num_nodes": Count,
    "strategy": Literal["auto", "ddp"],
    "sync_batchnorm": bool,
    "precision": Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"],
    "gradient_clip_val": Positive | None,
    "accumulate_grad_batches": Count,
    "early_stopping": Count | None,
    "log_every": Annotated[int, Field(ge=0)],
    "ema_decay": Annotated[float, Field(gt=0, lt=1)] | None,
}
TRAINER_REQUIRED = (
    "max_epochs",
    "accelerator",
    "devices",
    "precision",
    "gradient_clip_val",
    "early_stopping",
    "log_every",
)
# What `compress.training.fit` gives the Trainer itself, or what would leave a run without its checkpoints.
TRAINER_OWN = {
    "barebones",
    "callbacks",
    "default_root_dir",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "fast_dev_run",
    "log_every_n_steps",
    "logger",
    "max_steps",
    "num_sanity_val_steps",
    "plugins",
    "use_distributed_sampler",
}
STARTED_FROM = {"checkpoint": Text | None}
TEACHER = {
    "model": dict,
    "checkpoint": Text | None,
    "mean": list[float] | None,
    "standard_deviation": list[Positive] | None,
    "training": dict,
}
ENSEMBLE = {"members": list, "training": dict}
TEACHER_TRAINING = {
    "epochs": Count,
    "batch_size": BatchSize,
    "seed": Seed,
    "precision": TRAINER["precision"],
    "label_smoothing": BelowOne,
    "optimizer": dict,
    "scheduler": dict,
}
# Constructor arguments that the pipeline supplies.
SUPPLIED = {
    "student",
    "teacher",
    "others",
    "mixup",
    "loss",
    "optimizer",
    "scheduler",
    "num_classes",
    "input_shape",
    "seed",
    "device",
}


def check(config: DictConfig, overrides: Sequence[str] = (), student: nn.Module | None = None) -> nn.Module:
    """Raises UserError for the first thing in `config` that could not work; `overrides` are those that were typed.

    It looks at every value, at what the parts need of each other, at the files that the run reads and at what has
    to be installed; data that are missing are downloaded here where that is possible. `student` is what a stage before
    will leave, but for the values of its weights; what this run will leave is returned.
    """
    check_values(config)
    assert not config.stages, "stages are checked one by one"
    _check_roles(config, overrides)
    _check_training(config)
    for where in ensemble.keys(config):
        _check_teacher(config, where)
    _check_loggers(config)
    data = _check_data(config)
    has_peers = "peers" in parameter_names(get_object(config.method._target_))
    processes.check(config, data.record()["images"], has_peers)
    node = OmegaConf.to_container(config.student, resolve=True)
    if student is None:
        student = build_network(node, data.num_classes)
    teacher = None
    if teachers.is_used(config) and not ensemble.is_ensemble(config):
        node = OmegaConf.to_container(config.teacher.model, resolve=True)
        teacher = models.build(num_classes=data.num_classes, **node)
    if "peers" in parameter_names(get_object(config.method._target_)) and _is_pruned(node, student, data):
        raise UserError(
            "student.checkpoint: found a pruned network for a method whose peers would not be pruned; accepted: null, "
            "or a method without peers"
        )
    options = OmegaConf.to_container(config.method, resolve=True)
    get_object(config.method._target_).check_networks(options, student, teacher, data.input_shape)
    taught_by = [f"{key}.model" for key in ensemble.keys(config)] if teachers.is_used(config) else []
    for role in ("student", *(["peer"] if config.peer else []), *taught_by):
        _check_image_size(config, role, data)
    if config.pruning:
        student = _check_pruning(config, student, data)
    quantizer = check_quantizer(config, student) if config.quantizer else None
    if quantizer is not None:
        check_budget(quantizer, student, models.architecture(node, data.num_classes, student), data)
    if config.export.onnx:
        _check_onnx(quantizer)
    return student


def checked_jobs(overrides: Sequence[str], multirun: bool = False) -> list[tuple[list[str], DictConfig]]:
    """The overrides and the composed and checked configuration of every job of a command line."""
    return compose_jobs(overrides, multirun, check_job)


def check_job(config: DictConfig, overrides: Sequence[str]) -> None:
    """Checks a composed configuration, or those of its stages, each with the student that the one before leaves."""
    if not config.stages:
        check(config, overrides)
        return
    check_values(config)
    if config.trainer.get("num_nodes", 1) > 1:
        raise UserError(f"stages: found {len(config.stages)} for several machines; accepted: trainer.num_nodes=1")
    student = None
    for name, stage in compose_stages(config, overrides):
        try:
            student = check(stage, student=student)
        except UserError as mistake:
            raise UserError(f"stage {name}: {mistake}") from None


def _is_pruned(node: Mapping[str, Any], student: nn.Module, data: pl.LightningDataModule) -> bool:
    return bool(masks.found(student)) or "channels" in models.architecture(node, data.num_classes, student)


def _check_image_size(config: DictConfig, role: str, data: pl.LightningDataModule) -> None:
    """An image has to go through the network: one that shrinks images may have nothing left of them."""
    node = OmegaConf.to_container(OmegaConf.select(config, role), resolve=True)
    # Shapes alone are quick; a network that needs values shows on the CPU whether it works.
    for device in ("meta", "cpu"):
        try:
            with torch.device(device), torch.no_grad():
                network = build_network(node | {"checkpoint": None}, data.num_classes).eval()
                network(torch.zeros(1, *data.input_shape))
            return
        except RuntimeError as failure:
            mistake = failure
    raise UserError(
        f"data.image_size: found {data.image_size}, which {role} {node['stem']} cannot take "
        f"({str(mistake).splitlines()[0]}); accepted: a larger size, or another network"
    )


def check_values(config: DictConfig) -> None:
    """Checks every value against what receives it, and puts in its place what that takes: 10 for 1e1, say."""
    for key in config:
        if key not in (*GROUPS, *TOP_LEVEL):
            raise UserError(f"{key}: found an unknown key; accepted: {', '.join((*GROUPS, *TOP_LEVEL))}")
    for key in GROUPS:
        # An experiment spreads over the other groups and leaves nothing of its own.
        if key != "experiment" and not isinstance(config.get(key), DictConfig):
            raise UserError(f"{key}: found {config.get(key)!r}; accepted: {key}=OPTION, see --help")
    for group, before in (("pruning", {}), ("export", {"packed": True, "onnx": False}), ("stages", []), ("grid", {})):
        if group not in config:  # a run from before there was a choice
            with open_dict(config):
                config[group] = before
    for group in ("quantizer", "mixup", "pruning"):
        # `none` on the command line leaves what an experiment says of the option that it chose itself.
        if config[group] and "_target_" not in config[group]:
            config[group] = {}
    if config.teacher and not {"model", "members"} & config.teacher.keys():
        config.teacher = {}
    _coerce(config, "", TOP_LEVEL, accepted=[*TOP_LEVEL, *GROUPS], required=TOP_LEVEL)
    _check_stages(config)
    for group in ("data", "method", "loss", "scheduler"):
        _coerce_own(config, group)
    for group in ("quantizer", "mixup", "pruning"):
        if config[group]:
            _coerce_own(config, group)
    _coerce(config, "export", EXPORT, required=EXPORT)
    _coerce_optimizer(config, "optimizer")
    _check_model(config, "student")
    if config.peer:
        _check_model(config, "peer")
    accepted = sorted({*parameter_names(pl.Trainer), "early_stopping", "ema_decay", "log_every"} - TRAINER_OWN)
    _coerce(config, "trainer", TRAINER, accepted=accepted, required=TRAINER_REQUIRED)
    if config.teacher and ensemble.is_ensemble(config):
        _coerce(config, "teacher", ENSEMBLE, required=ENSEMBLE)
        _coerce_training(config, "teacher.training")
        ensemble.complete_members(config)
    for where in ensemble.keys(config):
        _coerce(config, where, TEACHER, required=TEACHER)
        _coerce_training(config, f"{where}.training")
        _check_model(config, f"{where}.model")


def _check_stages(config: DictConfig) -> None:
    stages = OmegaConf.to_container(config.stages, resolve=True)
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
        found = ", ".join(map(str, shares))
        raise UserError(f"stages: found the shares {found}; accepted: shares that sum to 1, or none at all")
    epochs = config.trainer.get("max_epochs")
    if any(shares) and isinstance(epochs, int) and epochs < len(stages):
        raise UserError(
            f"trainer.max_epochs: found {epochs} for {len(stages)} stages; accepted: at least {len(stages)}"
        )


def _coerce(
    config: DictConfig,
    where: str,
    target: Any,
    accepted: Collection[str] | None = None,
    required: Collection[str] = (),
) -> dict[str, Any]:
    node = OmegaConf.select(config, where) if where else config
    for key in required:
        if key not in node:
            raise UserError(
                f"{where}.{key}: found no such key; accepted: a configuration that has it".removeprefix(".")
            )
    plain = OmegaConf.to_container(node, resolve=True)
    values = check_arguments(target, plain, where, accepted=accepted)
    with open_dict(config):
        for key, value in values.items():
            if is_dataclass(value):
                node[key].update(asdict(value))
            elif not isinstance(value, Mapping):
                node[key] = value
    return values


def _coerce_training(config: DictConfig, where: str) -> None:
    _coerce(config, where, TEACHER_TRAINING, required=TEACHER_TRAINING)
    _coerce_optimizer(config, f"{where}.optimizer")
    _coerce_own(config, f"{where}.scheduler")


def _target(config: DictConfig, where: str) -> Any:
    node = OmegaConf.select(config, where)
    name = node.get("_target_") if isinstance(node, DictConfig) else None
    try:
        return get_object(name)
    except (ImportError, ValueError, TypeError, AttributeError):
        raise UserError(f"{where}: found {name!r}, which cannot be imported; accepted: an option, see --help") from None


def _coerce_own(config: DictConfig, where: str) -> None:
    target = _target(config, where)
    names = [name for name in _settable(target) if name not in SUPPLIED]
    _coerce(config, where, target, accepted=names)
    if where.endswith(("scheduler", "loss")):
        with _construction(where):
            instantiate(OmegaConf.select(config, where))


def _settable(target: Any) -> tuple[str, ...]:
    if inspect.isclass(target) and hasattr(target, "__dataclass_fields__"):
        return tuple(target.__dataclass_fields__)
    return parameter_names(target)


def _coerce_optimizer(config: DictConfig, where: str) -> None:
    target = _target(config, where)
    accepted = [name for name in parameter_names(target) if name not in ("params", "defaults")] + [DECAY]
    own = getattr(target, "__module__", "").startswith("compress.")
    values = _coerce(config, where, target if own else OPTIMIZER, accepted=accepted)
    decays = values.pop(DECAY, True)
    if not isinstance(decays, bool):
        raise UserError(f"{where}.{DECAY}: found {decays!r}; accepted: true or false")
    try:
        target([torch.nn.Parameter(torch.zeros(1))], **values)
    except (ImportError, TypeError, ValueError, RuntimeError) as failure:
        raise UserError(f"{where}: {failure}".splitlines()[0]) from None


def _check_model(config: DictConfig, where: str) -> None:
    node = OmegaConf.select(config, where)
    if not isinstance(node, DictConfig) or "stem" not in node:
        raise UserError(f"{where}: found {node!r}; accepted: {', '.join(models.available())}")
    options = OmegaConf.to_container(node, resolve=True)
    stem = options.pop("stem")
    if "checkpoint" in options:
        check_arguments(STARTED_FROM, {"checkpoint": options.pop("checkpoint")}, where)
    values = models.check_options(stem, options, where)
    with open_dict(config):
        for key in options.keys() & values.keys():
            node[key] = values[key]


def _check_roles(config: DictConfig, overrides: Sequence[str]) -> None:
    method = get_object(config.method._target_)
    takes = parameter_names(method)
    learns_from_teacher = teachers.is_used(config)
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


def _check_loggers(config: DictConfig) -> None:
    for name, node in config.logger.items():
        if name == "tensorboard" and find_spec("tensorboard") is None:
            raise UserError("logger: found tensorboard, which is not installed; pip install 'compress[tensorboard]'")
        where = f"logger.{name}"
        if not isinstance(node, DictConfig):
            raise UserError(f"{where}: found {node!r}; accepted: its keys, such as {where}.KEY=VALUE, or logger=OPTION")
        target = _target(config, where)
        own = target.__module__.startswith("compress.")
        accepted = [each for each in parameter_names(target) if each != "save_dir"]
        check_arguments(target if own else {}, node, where, accepted=accepted)
        if issubclass(target, WandbLogger):
            _check_wandb(node)


def _check_wandb(node: DictConfig) -> None:
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


def _check_data(config: DictConfig) -> pl.LightningDataModule:
    """Reads the data, and the teacher's checkpoints if there are any: what is wrong with a file is found now."""
    with _construction("data"):
        data = instantiate(config.data)
    data.prepare_data()
    data.setup()
    for where in ensemble.keys(config):
        node = OmegaConf.to_container(OmegaConf.select(config, where), resolve=True)
        if node["checkpoint"]:
            teacher = models.build(num_classes=data.num_classes, **node["model"])
            load_weights(teacher, Path(node["checkpoint"]), where=f"{where}.checkpoint")
    return data


def _check_pruning(config: DictConfig, student: nn.Module, data: pl.LightningDataModule) -> nn.Module:
    """The fresh `student` as pruning will leave it, but for the values of its weights."""
    with _construction("pruning"):
        recipe = instantiate(config.pruning)
    networks = {"student": student}
    if config.peer:
        node = OmegaConf.to_container(config.peer, resolve=True)
        networks["peer"] = models.build(num_classes=data.num_classes, **node)
    for role, network in networks.items():
        recipe.check(network, config.trainer.max_epochs, data.input_shape, role)
    return recipe.pruned(student, data.input_shape)


def check_quantizer(config: DictConfig, student: nn.Module) -> Quantizer:
    """The quantizer of `config`; raises UserError for options that do not go together or do not fit `student`."""
    quantizer = build(config.quantizer, "quantizer")
    quantizer.check(student)
    return quantizer


def check_budget(
    quantizer: Quantizer, student: nn.Module, architecture: Mapping[str, Any], data: pl.LightningDataModule
) -> None:
    """Raises UserError, naming the smallest possible file, for a budget that no widths of `student` can meet."""
    size = partial(file_bytes, **describe(architecture, data))
    quantizer.check_budget(student, data.calibration_batches(2), size, size(student))


def _check_onnx(quantizer: Quantizer | None) -> None:
    from compress.export.onnx import require_all

    require_all()
    if quantizer is None:
        return
    widths = [*quantizer.bits, *([quantizer.first_last_bits] if quantizer.first_last_bits else [])]
    wide = next((bits for bits in widths if quantizer.levels(bits) > 256), None)
    if wide is not None:
        raise UserError(
            f"export: found onnx with {quantizer.levels(wide)} levels at {wide} bits; accepted: up to 256 levels, "
            "which is 8 bits, or export=packed"
        )


@contextmanager
def _construction(where: str) -> Iterator[None]:
    """Turns what a constructor has against its arguments into a line about the group `where`."""
    try:
        yield
    except InstantiationException as failure:
        if isinstance(failure.__cause__, UserError):
            raise failure.__cause__ from None
        raise UserError(f"{where}: {failure.__cause__ or failure}".splitlines()[0]) from None
