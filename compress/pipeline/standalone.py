"""Quantizes a checkpoint without training: `scripts/quantize.py checkpoint=FILE quantizer=gpfq`."""

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn
from yaml import YAMLError

from compress import models, yaml_file
from compress.arguments import arguments_of
from compress.checksums import read_text
from compress.config import run_values
from compress.config.compose import compose_jobs
from compress.config.pretrained import class_names
from compress.config.ranges import STUDENT
from compress.config.received import allowed_targets, check_content, check_overrides
from compress.config.recorded import apply_override, read_config, write_config
from compress.config.rules import check_rules
from compress.config.values import check_values
from compress.data.folder import Folder
from compress.data.unlabelled import Unlabelled, has_labels
from compress.errors import UserError, first_line
from compress.export.formats import check_exporters
from compress.export.packed import read_float_description
from compress.export.weights import load_weights
from compress.files import check_can_be_made, make_directory
from compress.models import own_class
from compress.pipeline.check import check_image_sizes, check_latency, check_quantizer
from compress.pipeline.measure import measured
from compress.pipeline.parts import Parts, digest_of
from compress.results.record import Record
from compress.results.writing import show, write_results

GROUPS = ("data", "quantizer", "export")
# What scripts/run.py takes besides.
OF_TRAINING = {*run_values.GROUPS, "stages", "grid"} - {*GROUPS}
# What config.yaml has of the configuration.
RECORDED = ("seed", "data", "student", "quantizer", "export")
UNLABELLED = f"{Unlabelled.__module__}.{Unlabelled.__name__}"
KEYS = ("checkpoint", "model", "network", "seed", "output_directory", "trainer.accelerator")


def quantize_checkpoint(overrides: Sequence[str]) -> Path:
    """Does what the command line says and returns the directory with the results.

    `checkpoint=FILE` is a checkpoint or model file of this project, or a plain state dict, for which `model=` gives the
    architecture; `network=mynet.MyNet` is the class of one that was trained as `student=module`. A file from a run
    directory brings that run's data with it; others take `data=`, the digits if it is not given. `data=folder` may name
    pictures without labels; the table then has the agreement with the float network.
    Raises UserError with one line for whatever is wrong, before anything is written, and for what no file may say, see
    `compress.config.received`.
    """
    allowed, overrides = allowed_targets(overrides)
    typed = _split(overrides)
    path, about = None, None
    if "checkpoint" in typed:
        path = Path(typed["checkpoint"]).expanduser()
        if not path.is_file():
            raise UserError(f"checkpoint: found no file at {path}; accepted: a checkpoint or model file")
        about = read_float_description(path)
        if about:
            check_content({key: value for key, value in about.items() if key != "architecture"}, path, allowed)
    elif "model.pretrained" not in typed:
        raise UserError("checkpoint: found none; accepted: checkpoint=FILE, or model.pretrained=true with model=timm")
    config = _composed(path, overrides, typed, about, allowed)
    parts = Parts(config)
    parent = Path(parts.plain["output_directory"]) / "quantized"
    check_can_be_made(parent, "output_directory")
    path = path or Path(config.student.checkpoint)
    student = _loaded(parts, path, about)
    if parts.quantizer is not None:
        check_quantizer(parts, parts.quantizer, student)
    check_exporters(parts.exporters, parts.quantizer)
    check_image_sizes(parts, training=False)
    check_latency(parts, parts.quantizer, student)
    label = parts.label("student")
    directory = make_directory(parent, f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{label}".replace("/", "-"))
    recorded = OmegaConf.create({"checkpoint": str(path), **{key: parts.plain[key] for key in RECORDED}})
    write_config(directory, recorded)
    parts.configuration = digest_of(recorded)  # of what is left, and not of a training that there is none of
    try:
        result = measured(parts, directory, "model", student, student)
    except UserError:
        shutil.rmtree(directory)
        raise
    title = f"{label} of {path.name}"
    record = Record(overrides=list(overrides), teacher=None, **result.record(parts, checkpoint=str(path)))
    write_results(directory, record, title, result.panels())
    show(directory, record, title)
    return directory


def read_written(directory: Path, allowed: Collection[str]) -> DictConfig:
    """The configuration, its values checked, by which `quantize_checkpoint` left what is in `directory`.

    What is not recorded, because nothing is trained, is as it comes. `allowed`, and what is raised: see `read_config`.
    """
    recorded = read_config(directory, {*allowed, UNLABELLED}, ("checkpoint", *RECORDED))
    [job] = compose_jobs(["method=supervised"])
    with open_dict(job.config):
        job.config.update({key: recorded[key] for key in RECORDED})
    check_values(job.config)
    return job.config


def _composed(
    path: Path | None,
    overrides: Sequence[str],
    typed: Mapping[str, str],
    about: Mapping[str, Any] | None,
    allowed: Collection[str],
) -> DictConfig:
    """The configuration of what was typed and of what the file at `path` and its run say, its values checked."""
    budgets = [override for override in overrides if override.lstrip("+").startswith("quantizer.budget=")]
    others = [
        override
        for override in overrides
        if override.lstrip("+").partition("=")[0].partition(".")[0] not in ("checkpoint", "model", "network")
        and override not in budgets
    ]
    given = [*_model(path, typed, about), *_data(path, typed, about)]
    check_overrides(given, path, {*allowed, typed.get("network", "")})
    keys = [f"student.{key.removeprefix('model.')}={value}" for key, value in typed.items() if key.startswith("model.")]
    [job] = compose_jobs(["method=supervised", *given, *keys, *others])
    _take_pictures(job.config, typed, about)
    if not job.config.quantizer:
        raise UserError("quantizer: found none, and nothing else is done here; accepted: gpfq, gptq, qronos, spfq, rtn")
    # What its file takes depends on the network that is loaded, which may be pruned.
    for override in budgets:
        apply_override(job.config, override)
    check_values(job.config)
    check_rules(job.config)
    return job.config


def _take_pictures(config: DictConfig, typed: Mapping[str, str], about: Mapping[str, Any] | None) -> None:
    """Makes its data those without labels where `data=folder` names a folder of mere pictures.

    The network's classes and the size of its images are those that its file says, unless they were typed.
    """
    data = config.data
    names_folder = data.get("_target_") == f"{Folder.__module__}.{Folder.__name__}"
    if not names_folder or not Path(data.root).expanduser().is_dir() or has_labels(data.root):
        return
    data._target_ = UNLABELLED
    if data.class_names is None:
        names = about["class_names"] if about else class_names(config.student, config.student, "student")
        data.class_names = list(names) or None
    if about and "data.image_size" not in typed:
        data.image_size = about["input_shape"][-1]


def _loaded(parts: Parts, path: Path, about: Mapping[str, Any] | None) -> nn.Module:
    """The student with the weights of the file at `path`, which has to be of the same classes as the data."""
    pl.seed_everything(parts.plain["seed"], verbose=False)
    if about and about["class_names"] != list(parts.data.class_names):
        names = ", ".join(about["class_names"][:3])
        raise UserError(f"data: found other classes than those of {path} ({names}, ...); accepted: its own data")
    if parts.plain["student"]["checkpoint"] is None:
        load_weights(parts.student, path)
    return parts.student.eval().to(parts.data.device)


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
                f"{override}: nothing is trained here; accepted: {', '.join(f'{name}=' for name in (*KEYS, *GROUPS))} "
                f"and the keys of {', '.join(GROUPS)} and model"
            )
        typed[key] = value
    return typed


def _model(path: Path | None, typed: Mapping[str, str], about: Mapping[str, Any] | None) -> list[str]:
    """The overrides that compose the network: the typed stem, what the file says of itself, or what its run says."""
    if "model" in typed:
        if "network" in typed:
            raise UserError("network: found it beside model; accepted: one of the two")
        return [f"student={typed['model']}"]
    run = _run_of(path)
    if about:
        own_class.refuse_targets(about["architecture"]["options"])
        node = about["architecture"]["options"] | {"stem": about["architecture"]["stem"]}
    elif run is not None:
        node = run["student"]
    elif "network" in typed:
        node = {"stem": own_class.STEM}
    else:
        raise UserError(f"model: found none, and {path} does not say it; accepted: {', '.join(models.available())}")
    if models.names_class(node["stem"]):
        node = _own_class(path, typed, node)
    elif "network" in typed:
        raise UserError(f"network: found a class for {path}, which is of {node['stem']}; accepted: no network=")
    return _overrides("student", node)


def _own_class(path: Path | None, typed: Mapping[str, str], node: Mapping[str, Any]) -> dict[str, Any]:
    """The `node` of a network of the user's own class, which has to be typed: no file may name code to run."""
    if "network" not in typed:
        raise UserError(
            f"{path}: found a network of the class {str(node.get('target'))!r}, and no file may name code to run; "
            "accepted: network=mynet.MyNet, that class"
        )
    own_class.typed(typed["network"])
    return {"stem": node["stem"], "target": typed["network"], "arguments": node.get("arguments")}


def _data(path: Path | None, typed: Mapping[str, str], about: Mapping[str, Any] | None) -> list[str]:
    """The overrides for the data: those of the run that the file lies in, and the file's own normalisation."""
    run = _run_of(path)
    overrides = [] if run is None or "data" in typed else _overrides("data", run["data"])
    if about:
        overrides += [f"data.{key}={json.dumps(about[key])}" for key in ("mean", "standard_deviation")]
    return overrides


def _overrides(group: str, node: Mapping[str, Any]) -> list[str]:
    """What composes the `node` of a `group` again, but for its weights."""
    keys = {key: value for key, value in arguments_of(node).items() if key not in STUDENT}
    return [f"{group}={node['stem']}", *(f"++{group}.{key}={_value(value)}" for key, value in keys.items())]


def _value(value: Any) -> str:
    """`value` as it is typed."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value(one)}" for key, one in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def _run_of(path: Path | None) -> dict[str, Any] | None:
    """The configuration, unresolved, of the run in whose `models/` or `checkpoints/` the file lies."""
    file = path and path.resolve().parent.parent / "config.yaml"
    if not file or not file.is_file():
        return None
    try:
        yaml_file.check(read_text(file))
    except (YAMLError, UnicodeDecodeError) as failure:
        raise UserError(f"{file}: cannot be read as YAML ({first_line(failure)}); accepted: that of a run") from None
    config: Any = OmegaConf.to_container(OmegaConf.load(file))
    known = isinstance(config, dict) and all(isinstance(config.get(key), dict) for key in ("student", "data"))
    return config if known else None
