"""Quantizes a checkpoint without training: `scripts/quantize.py checkpoint=FILE quantizer=gpfq`."""

import json
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from compress import models
from compress.config import compose as configuration
from compress.errors import UserError
from compress.export.packed import read_float_description
from compress.export.weights import build_network, load_weights
from compress.files import make_directory, write_text
from compress.pipeline import checks
from compress.pipeline.checks import checked_jobs
from compress.pipeline.variants import Variants
from compress.pipeline.weight_panels import weight_panels
from compress.results.record import Record
from compress.results.surroundings import surroundings
from compress.results.writing import show, write_results
from compress.training.fit import device

GROUPS = ("data", "quantizer", "export")
# What scripts/run.py takes besides.
OF_TRAINING = {*checks.GROUPS, "stages", "grid"} - {*GROUPS}
KEYS = ("checkpoint", "model", "seed", "output_directory", "trainer.accelerator")


def quantize_checkpoint(overrides: Sequence[str]) -> Path:
    """Does what the command line says and returns the directory with the results.

    `checkpoint=FILE` is a checkpoint or model file of this project, or a plain state dict, for which `model=` gives the
    architecture. A file from a run directory brings that run's data with it; others take `data=`, the digits if it is
    not given. Raises UserError with one line for whatever is wrong, before anything is written.
    """
    typed = _split(overrides)
    if "checkpoint" not in typed:
        raise UserError("checkpoint: found none; accepted: checkpoint=FILE")
    path = Path(typed["checkpoint"]).expanduser()
    if not path.is_file():
        raise UserError(f"checkpoint: found no file at {path}; accepted: a checkpoint or model file")
    budgets = [each for each in overrides if each.lstrip("+").startswith("quantizer.budget=")]
    rest = [each for each in overrides if each.partition("=")[0] not in ("checkpoint", "model") and each not in budgets]
    about = read_float_description(path)
    config = _composed([*_model(path, typed, about), *_data(path, typed, about), *rest])
    # What its file takes depends on the network that is loaded below, which may be pruned.
    for override in budgets:
        configuration.apply_override(config, override)
    checks.check_values(config)

    plain = OmegaConf.to_container(config, resolve=True)
    pl.seed_everything(config.seed, verbose=False)
    data = instantiate(config.data, seed=config.seed, device=device(config.trainer.accelerator))
    data.setup()
    if about and about["class_names"] != list(data.class_names):
        found = ", ".join(about["class_names"][:3])
        raise UserError(f"data: found other classes than those of {path} ({found}, ...); accepted: its own data")
    student = build_network(plain["student"], data.num_classes)
    load_weights(student, path)
    student = student.eval().to(data.device)
    architecture = models.architecture(plain["student"], data.num_classes, student)
    quantizer = checks.check_quantizer(config, student)
    checks.check_budget(quantizer, student, architecture, data)

    stem = plain["student"]["stem"]
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{stem}"
    directory = make_directory(Path(config.output_directory) / "quantized", name)
    kept = {key: plain[key] for key in ("seed", "data", "student", "quantizer", "export")}
    write_text(directory / "config.yaml", OmegaConf.to_yaml({"checkpoint": str(path), **kept}))
    variants = Variants(data, directory, architecture, plain["export"])
    try:
        # Convolutions on recent GPUs would otherwise round to TF32, and the table promises float32.
        with torch.backends.cudnn.flags(allow_tf32=False):
            variants.add_float(student)
            variants.quantize(student, quantizer)
            variants.finish()
    except UserError:
        shutil.rmtree(directory)
        raise
    record = Record(
        overrides=list(overrides),
        **surroundings(),
        seed=config.seed,
        data=data.record(),
        teacher=None,
        student={
            "model": stem,
            "checkpoint": str(path),
            "parameters": models.count_parameters(student),
            "macs": models.count_macs(student, data.input_shape),
            "validation_accuracy": variants.rows[0].validation_accuracy,
            "test_accuracy": variants.rows[0].test_accuracy,
            "test_accuracy_per_class": dict(zip(data.class_names, variants.test.per_class, strict=True)),
        },
        rows=variants.rows,
        layers=variants.layers,
    )
    title = f"{stem} of {path.name}"
    write_results(directory, record, title, weight_panels(variants.student, variants.quantized))
    show(directory, record.rows, title)
    return directory


def _split(overrides: Sequence[str]) -> dict[str, str]:
    typed = {}
    for override in overrides:
        key, equals, value = override.lstrip("+~").partition("=")
        known = key in KEYS or key.split(".")[0] in (*GROUPS, "model")
        if equals and not known and key.split(".")[0] not in OF_TRAINING:
            raise UserError(
                f"{key}: found an unknown key; accepted: {', '.join(KEYS)}, {', '.join(GROUPS)} and the keys of these"
            )
        if not equals or not known:
            raise UserError(
                f"{override}: nothing is trained here; accepted: {', '.join(f'{each}=' for each in (*KEYS, *GROUPS))} "
                f"and the keys of {', '.join(GROUPS)} and model"
            )
        typed[key] = value
    return typed


def _model(path: Path, typed: Mapping[str, str], about: Mapping[str, Any] | None) -> list[str]:
    """The overrides that compose the network: what was typed, what the file says of itself, or what its run says."""
    keys = [f"student.{key.removeprefix('model.')}={value}" for key, value in typed.items() if key.startswith("model.")]
    if "model" in typed:
        return [f"student={typed['model']}", *keys]
    if about:
        architecture = about["architecture"]
        return _overrides("student", architecture["stem"], architecture["options"]) + keys
    run = _run_of(path)
    if run is None:
        raise UserError(f"model: found none, and {path} does not say it; accepted: {', '.join(models.available())}")
    node = OmegaConf.to_container(run.student)
    stem = node.pop("stem")
    for key in ("_target_", "checkpoint"):
        node.pop(key, None)
    return _overrides("student", stem, node) + keys


def _data(path: Path, typed: Mapping[str, str], about: Mapping[str, Any] | None) -> list[str]:
    """The overrides for the data: those of the run that the file lies in, and the file's own normalisation."""
    found = []
    run = _run_of(path)
    if run is not None and "data" not in typed:
        node = OmegaConf.to_container(run.data)
        # A data set's module has the name of its option.
        stem = node.pop("_target_").rpartition(".")[0].rpartition(".")[2]
        found = _overrides("data", stem, node)
    if about:
        found += [f"data.{key}={json.dumps(about[key])}" for key in ("mean", "standard_deviation")]
    return found


def _overrides(group: str, stem: str, keys: Mapping[str, Any]) -> list[str]:
    return [
        f"{group}={stem}",
        *(f"++{group}.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()),
    ]


def _run_of(path: Path) -> DictConfig | None:
    """The configuration of the run in whose `models/` or `checkpoints/` the file lies."""
    file = path.resolve().parent.parent / "config.yaml"
    if not file.is_file():
        return None
    config = OmegaConf.load(file)
    return config if isinstance(config, DictConfig) and {"student", "data"} <= config.keys() else None


def _composed(overrides: list[str]) -> DictConfig:
    [(_, config)] = checked_jobs(["method=supervised", *overrides])
    if not config.quantizer:
        raise UserError("quantizer: found none, and nothing else is done here; accepted: gpfq, gptq, qronos, spfq, rtn")
    return config
