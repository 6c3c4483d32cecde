"""Where a teacher comes from: a checkpoint, the cache of teachers trained before, or a training of its own."""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from filelock import FileLock, Timeout

from compress import models
from compress.arguments import build
from compress.checksums import digest
from compress.config import ensemble
from compress.data.module import DataModule
from compress.errors import UserError
from compress.evaluation import evaluate
from compress.export import container
from compress.export.weights import load_weights
from compress.files import read_json, remove_leftovers, write_json
from compress.losses.cross_entropy import CrossEntropy
from compress.methods.frozen_teacher import FrozenEnsemble, FrozenTeacher
from compress.methods.learning_teacher import LearningTeacher
from compress.methods.supervised import Supervised
from compress.optim.groups import optimizer_factory
from compress.pipeline.parts import Parts
from compress.progress import console
from compress.results.surroundings import versions_in_files
from compress.training.fit import BEST, fit
from compress.training.threads import threads_for

KIND = "compress-teacher-1"
# Keys of `data` that the teacher's training has of its own, or that change nothing about it.
NOT_IN_KEY = ("stem", "batch_size", "evaluation_batch_size", "storage", "workers", "max_pixels")
# Those that came later: where they are null, a teacher is one that was trained before they existed.
LATER = ("class_names", "colour_jitter", "random_resized_crop", "stored_size")


@dataclass(frozen=True)
class Teacher:
    """A function `(B, 3, H, W) -> (B, C)`, ready to be called by a method, with what is known about it.

    `learning` is the same network for a method that trains it further; an ensemble has none.
    """

    frozen: FrozenTeacher | FrozenEnsemble
    record: dict[str, Any]
    learning: LearningTeacher | None = None


def resolve(parts: Parts, directory: Path) -> Teacher | None:
    """The teacher of a run: `teacher.checkpoint` if given, else the cached one, else one trained now and kept.

    Every member of an ensemble is found or trained as it would be on its own. None for a method that uses no teacher.

    The cache is `<output_directory>/teachers`, its key a hash of `teacher.model`, `teacher.training` and `data`. A
    file lock lets one job train while others wait for it. Interrupted training goes on where it was. `directory` is
    that of the run, which the cached file remembers.
    """
    members = [_Member(parts, key, directory).resolve() for key in parts.teacher_keys]
    if not members:
        return None
    return _ensemble(members, parts.data) if ensemble.is_ensemble(parts.config) else members[0]


def _ensemble(members: list[Teacher], data: DataModule) -> Teacher:
    frozen = FrozenEnsemble([cast(FrozenTeacher, member.frozen) for member in members])  # each a single network
    validation = evaluate(frozen, data.val_dataloader(), data.num_classes)
    console.print(
        f"teacher ensemble of {len(members)}: validation accuracy {100 * validation.accuracy:.2f} %", style="bold"
    )
    records = [member.record for member in members]
    record = {
        "model": "ensemble",
        "members": records,
        "trained_in_this_run": any(record["trained_in_this_run"] for record in records),
        "seconds": round(sum(record["seconds"] for record in records), 1),
        "parameters": sum(record["parameters"] for record in records),
        "macs": sum(record["macs"] for record in records),
        "validation_accuracy": validation.accuracy,
    }
    return Teacher(frozen, record)


def tested(teacher: Teacher, parts: Parts) -> dict[str, Any]:
    """The teacher's record with its accuracy on the test set, which it meets here and nowhere else, in float32.

    It is that of the teacher as it was found; of one that learned since, the validation accuracy is added.
    """
    data = parts.data
    teacher.frozen.to_float32(data.device)
    test = evaluate(teacher.frozen, data.test_dataloader(), data.num_classes)
    per_class = dict(zip(data.class_names, test.per_class, strict=True))
    record = teacher.record | {"test_accuracy": test.accuracy, "test_accuracy_per_class": per_class}
    if parts.updates_teacher and teacher.learning is not None:
        learned = teacher.learning.float().eval().to(data.device)
        record["validation_accuracy_after"] = evaluate(learned, data.val_dataloader(), data.num_classes).accuracy
    return record


def cache_path(parts: Parts, key: str) -> Path:
    """Where the teacher at `key` of the configuration is kept once it has been trained."""
    node = parts.node(key)
    data = {name: value for name, value in parts.plain["data"].items() if name not in NOT_IN_KEY}
    data = {name: value for name, value in data.items() if not (name in LATER and value is None)}
    if data.get("root"):
        data["root"] = str(Path(data["root"]).expanduser().resolve())
    identity = {"model": node["model"], "training": _without_stems(node["training"]), "data": data}
    name = f"{node['model']['stem']}-{digest(json.dumps(identity, sort_keys=True))[:12]}.safetensors"
    return Path(parts.plain["output_directory"]) / "teachers" / name


def _without_stems(training: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {key: value for key, value in part.items() if key != "stem"} if isinstance(part, dict) else part
        for name, part in training.items()
    }


class _Member:
    """One network of a teacher: its place `key` in the configuration of `parts`, found or trained."""

    def __init__(self, parts: Parts, key: str, directory: Path) -> None:
        self.parts, self.key, self.directory = parts, key, directory
        self.node = parts.node(key)
        self.label = parts.label(key)
        self.network = parts.teacher_network(key)

    def resolve(self) -> Teacher:
        started = time.perf_counter()
        data = self.parts.data
        if self.parts.trains_teacher(self.key):
            path, trained = self._find_or_train()
            where = f"trained in this run and kept as {path}" if trained else f"found in {path}"
        elif self.node["checkpoint"] is not None:
            path, trained = Path(self.node["checkpoint"]), False
            self.parts.load_teacher(self.network, self.key)
            where = f"from {path}"
        else:
            path, trained, where = None, False, "as it was given"
        renormalise = _renormalise(self.node, data)
        frozen = FrozenTeacher(self.network, data.input_shape, renormalise)
        frozen.to_float32(data.device)
        validation = evaluate(frozen, data.val_dataloader(), data.num_classes)
        accuracy = f"validation accuracy {100 * validation.accuracy:.2f} %"
        console.print(f"teacher {self.label} {where}: {accuracy}", style="bold")
        record = {
            "model": self.label,
            "file": path and str(path),
            "trained_in_this_run": trained,
            "seconds": round(time.perf_counter() - started, 1),
            "parameters": models.count_parameters(self.network),
            "macs": models.count_macs(self.network, data.input_shape),
            "validation_accuracy": validation.accuracy,
        }
        learning = LearningTeacher(self.network, renormalise)
        return Teacher(frozen, record, learning)

    def _find_or_train(self) -> tuple[Path, bool]:
        """The file of the trained teacher, loaded, and whether this run has trained it."""
        path = cache_path(self.parts, self.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            console.print(f"teacher {self.label}: another job is training it, waiting")
            lock.acquire()
        try:
            remove_leftovers(path.parent, path.stem)
            if not path.exists():
                self._train(path)
            # Also where the training was killed between keeping the teacher and this.
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        finally:
            lock.release()
        try:
            load_weights(self.network, path, where="teacher")
        except UserError as mistake:
            problem = str(mistake).partition("; accepted:")[0]
            raise UserError(f"{problem}; accepted: to remove that file, and the teacher is trained again") from None
        # Not whether it was just now: the run may have been interrupted since.
        identity = path.with_suffix(".json")
        content = read_json(identity, "to remove it") if identity.exists() else {}
        return path, content.get("run") == str(self.directory.resolve())

    def _train(self, path: Path) -> None:
        training, trainer = self.node["training"], self.parts.plain["trainer"]
        console.print(f"teacher {self.label}: none trained under this configuration yet, training it", style="bold")
        pl.seed_everything(training["seed"], verbose=False)
        data = self.parts.data_with(training["seed"], training["batch_size"])
        network = self.parts.teacher_network(self.key)
        module = Supervised(
            student=network,
            loss=CrossEntropy(training["label_smoothing"]),
            optimizer=optimizer_factory(training["optimizer"]),
            scheduler=build(training["scheduler"], f"{self.key}.training.scheduler"),
            num_classes=data.num_classes,
            input_shape=data.input_shape,
            seed=training["seed"],
        )
        directory = path.with_suffix("")
        # Of the student's options only those that say where and how talkatively; the rest is not in the teacher's key.
        options = {key: trainer[key] for key in ("accelerator", "devices", "log_every", "cuda_graph") if key in trainer}
        options |= {"max_epochs": training["epochs"], "precision": training["precision"], "early_stopping": None}
        macs = models.count_macs(network, data.input_shape)
        with threads_for(macs * data.batch_size):
            fit(module, data, options, directory, label="teacher")
        load_weights(network, directory / BEST, where="teacher")
        identity = {"model": self.node["model"], "training": training, "data": self.parts.plain["data"]}
        write_json(path.with_suffix(".json"), identity | {"run": str(self.directory.resolve())})
        about = {"configuration": digest(json.dumps(identity, sort_keys=True)), "seed": training["seed"]}
        container.write(path, KIND, about | {"versions": versions_in_files()}, network.state_dict())


def _renormalise(node: dict[str, Any], data: DataModule) -> tuple[torch.Tensor, torch.Tensor] | None:
    """From the data's normalisation to the teacher's: `(x * std + mean - teacher_mean) / teacher_std`."""
    if node["mean"] is None:
        return None
    data_mean, data_deviation = (torch.tensor(values).expand(3) for values in (data.mean, data.standard_deviation))
    mean, deviation = (torch.tensor(node[key]).expand(3) for key in ("mean", "standard_deviation"))
    return data_deviation / deviation, (data_mean - mean) / deviation
