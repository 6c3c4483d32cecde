"""Where a teacher comes from: a checkpoint, the cache of teachers trained before, or a training of its own."""

import hashlib
import inspect
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from filelock import FileLock, Timeout
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import nn

from compress import models
from compress.arguments import parameter_names
from compress.config import ensemble
from compress.errors import UserError
from compress.evaluation import evaluate
from compress.export.weights import load_weights
from compress.files import remove_leftovers, write_atomically, write_json
from compress.losses.cross_entropy import CrossEntropy
from compress.methods.frozen_teacher import FrozenEnsemble, FrozenTeacher
from compress.methods.learning_teacher import LearningTeacher
from compress.methods.supervised import Supervised
from compress.optim.groups import optimizer_factory
from compress.progress import console
from compress.training.fit import BEST, fit
from compress.training.threads import threads_for

# Keys of `data` that the teacher's training has of its own, or that change nothing about it.
NOT_IN_KEY = ("batch_size", "evaluation_batch_size")


@dataclass(frozen=True)
class Teacher:
    """A function `(B, 3, H, W) -> (B, C)`, ready to be called by a method, with what is known about it.

    `learning` is the same network for a method that trains it further; an ensemble has none.
    """

    frozen: FrozenTeacher | FrozenEnsemble
    record: dict[str, Any]
    learning: LearningTeacher | None = None


def is_used(config: DictConfig) -> bool:
    """Whether the method of `config` learns from a teacher; one that may do without does so where its loss does."""
    method = get_class(config.method._target_)
    if "teacher" not in parameter_names(method):
        return False
    own = inspect.signature(method).parameters.get("teacher")
    optional = own is not None and own.default is None
    return not optional or get_class(config.loss._target_).compares_with == "teacher"


def resolve(
    config: DictConfig, data: pl.LightningDataModule, trainer_options: dict[str, Any], directory: Path
) -> Teacher:
    """The teacher of `config`: `teacher.checkpoint` if given, else the cached one, else one trained now and kept.

    Of an ensemble every member is one of these, found or trained as it would be on its own.

    The cache is `<output_directory>/teachers`, its key a hash of `teacher.model`, `teacher.training` and `data`. A
    file lock lets one job train while others wait for it. Interrupted training goes on where it was. `directory` is
    that of the run, which the kept file remembers.
    """
    alone = [ensemble.alone(config, key) for key in ensemble.keys(config)]
    members = [_resolve(each, data, trainer_options, directory) for each in alone]
    if not ensemble.is_ensemble(config):
        return members[0]
    frozen = FrozenEnsemble([member.frozen for member in members])
    validation = evaluate(frozen, data.val_dataloader(), data.num_classes)
    console.print(
        f"teacher ensemble of {len(members)}: validation accuracy {100 * validation.accuracy:.2f} %", style="bold"
    )
    records = [member.record for member in members]
    record = {
        "model": "ensemble",
        "members": records,
        "trained_in_this_run": any(each["trained_in_this_run"] for each in records),
        "seconds": round(sum(each["seconds"] for each in records), 1),
        "parameters": sum(each["parameters"] for each in records),
        "macs": sum(each["macs"] for each in records),
        "validation_accuracy": validation.accuracy,
    }
    return Teacher(frozen, record)


def _resolve(
    config: DictConfig, data: pl.LightningDataModule, trainer_options: dict[str, Any], directory: Path
) -> Teacher:
    node = OmegaConf.to_container(config.teacher, resolve=True)
    network = models.build(num_classes=data.num_classes, **node["model"])
    stem = node["model"]["stem"]
    started = time.perf_counter()
    if node["checkpoint"] is not None:
        path, trained = Path(node["checkpoint"]), False
        load_weights(network, path, where="teacher.checkpoint")
        where = f"from {path}"
    else:
        path, trained = _find_or_train(config, node, network, trainer_options, data.device, directory)
        where = f"trained in this run and kept as {path}" if trained else f"found in {path}"
    renormalise = _renormalise(node, data)
    frozen = FrozenTeacher(network, renormalise)
    frozen.to_float32(data.device)
    validation = evaluate(frozen, data.val_dataloader(), data.num_classes)
    console.print(f"teacher {stem} {where}: validation accuracy {100 * validation.accuracy:.2f} %", style="bold")
    record = {
        "model": stem,
        "file": str(path),
        "trained_in_this_run": trained,
        "seconds": round(time.perf_counter() - started, 1),
        "parameters": models.count_parameters(network),
        "macs": models.count_macs(network, data.input_shape),
        "validation_accuracy": validation.accuracy,
    }
    learning = LearningTeacher(network.to(memory_format=torch.channels_last), renormalise)
    return Teacher(frozen, record, learning)


def test_record(teacher: Teacher, data: pl.LightningDataModule, updated: bool) -> dict[str, Any]:
    """The teacher's record with its accuracy on the test set, which it meets here and nowhere else, in float32.

    It is that of the teacher as it was found; of one that was `updated` since, the validation accuracy is added.
    """
    teacher.frozen.to_float32(data.device)
    test = evaluate(teacher.frozen, data.test_dataloader(), data.num_classes)
    per_class = dict(zip(data.class_names, test.per_class, strict=True))
    record = teacher.record | {"test_accuracy": test.accuracy, "test_accuracy_per_class": per_class}
    if updated:
        learned = teacher.learning.float().eval().to(data.device)
        record["validation_accuracy_after"] = evaluate(learned, data.val_dataloader(), data.num_classes).accuracy
    return record


def cache_path(config: DictConfig) -> Path:
    """Where the teacher of `config` is kept once it has been trained."""
    plain = OmegaConf.to_container(config, resolve=True)
    data = {key: value for key, value in plain["data"].items() if key not in NOT_IN_KEY}
    if "root" in data:
        data["root"] = str(Path(data["root"]).expanduser().resolve())
    identity = {"model": plain["teacher"]["model"], "training": plain["teacher"]["training"], "data": data}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return Path(plain["output_directory"]) / "teachers" / f"{plain['teacher']['model']['stem']}-{digest}.safetensors"


def _find_or_train(
    config: DictConfig,
    node: dict[str, Any],
    network: nn.Module,
    trainer_options: dict[str, Any],
    device: torch.device,
    directory: Path,
) -> tuple[Path, bool]:
    path = cache_path(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"teacher {node['model']['stem']}: another job is training it, waiting")
        lock.acquire()
    try:
        remove_leftovers(path.parent, path.stem)
        if not path.exists():
            _train(config, node["training"], node["model"], path, trainer_options, device, directory)
        # Also where the training was killed between keeping the teacher and this.
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
    finally:
        lock.release()
    try:
        load_weights(network, path, where="teacher")
    except UserError as mistake:
        found = str(mistake).partition("; accepted:")[0]
        raise UserError(f"{found}; accepted: to remove that file, and the teacher is trained again") from None
    # Not whether it was just now: the run may have been interrupted since.
    identity = path.with_suffix(".json")
    kept = json.loads(identity.read_text(encoding="utf-8")) if identity.exists() else {}
    return path, kept.get("run") == str(directory.resolve())


def _train(
    config: DictConfig,
    training: dict[str, Any],
    model: dict[str, Any],
    path: Path,
    trainer_options: dict[str, Any],
    device: torch.device,
    run: Path,
) -> None:
    console.print(f"teacher {model['stem']}: none trained under this configuration yet, training it", style="bold")
    pl.seed_everything(training["seed"], verbose=False)
    own_data = instantiate(config.data, batch_size=training["batch_size"], seed=training["seed"], device=device)
    own_data.setup()
    network = models.build(num_classes=own_data.num_classes, **model).to(memory_format=torch.channels_last)
    module = Supervised(
        student=network,
        loss=CrossEntropy(training["label_smoothing"]),
        optimizer=optimizer_factory(training["optimizer"]),
        scheduler=instantiate(training["scheduler"]),
        num_classes=own_data.num_classes,
        seed=training["seed"],
    )
    directory = path.with_suffix("")
    # Of the student's options only those that say where and how talkatively; the rest is not in the teacher's key.
    options = {key: trainer_options[key] for key in ("accelerator", "devices", "log_every")}
    options |= {"max_epochs": training["epochs"], "precision": training["precision"], "early_stopping": None}
    macs = models.count_macs(network, own_data.input_shape)
    with threads_for(macs * own_data.batch_size):
        fit(module, own_data, options, directory, label="teacher")
    load_weights(network, directory / BEST, where="teacher")
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    identity = {"model": model, "training": training, "data": OmegaConf.to_container(config.data, resolve=True)}
    identity["run"] = str(run.resolve())
    write_json(path.with_suffix(".json"), identity)
    write_atomically(path, lambda temporary: save_file(state, temporary))


def _renormalise(node: dict[str, Any], data: pl.LightningDataModule) -> tuple[torch.Tensor, torch.Tensor] | None:
    """From the data's normalisation to the teacher's own: `(x * std + mean - teacher_mean) / teacher_std`."""
    if node["mean"] is None:
        return None
    own_mean, own_deviation = (
        torch.tensor(data_values).expand(3) for data_values in (data.mean, data.standard_deviation)
    )
    mean, deviation = (torch.tensor(node[key]).expand(3) for key in ("mean", "standard_deviation"))
    return own_deviation / deviation, (own_mean - mean) / deviation
