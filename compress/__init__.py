"""Distil, prune and quantize image classifiers: the most accuracy per byte, and the file."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# PyTorch's threads read this when PyTorch is imported. They wait awake for their next operation, a thirtieth as long as
# they would by themselves: enough within a training step, and beside other jobs it does not keep cores from them.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Both before these are imported: ONNX Runtime 1.32 reports its use to Microsoft unless it finds this variable, and
# OpenVINO 2026.4 each import to Google Analytics unless that package is missing.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: not to be imported

if TYPE_CHECKING:
    from torch import nn

    from compress.pipeline.own_module import QuantizedNetwork
    from compress.pipeline.run import Result


def run(
    overrides: Sequence[str] = (),
    config_dir: str | Path | None = None,
    student: "nn.Module | None" = None,
    teacher: "nn.Module | None" = None,
) -> "Result | None":
    """Does one run from Python as the command line would: `compress.run(["method=dkd", "student=resnet18"])`.

    Paths such as `output_directory` are relative to the working directory; `config_dir` is a folder of YAML groups of
    your own, laid out as `conf/`. `student` and `teacher` are networks in place of stems: of the student a copy is
    trained, from the weights that it has; the teacher is used as it is given, for images as the data normalise them
    or, with `teacher.mean` and `teacher.standard_deviation`, as it knows them. With `resume=DIRECTORY` a run goes on,
    and needs the networks again. Raises `compress.errors.UserError` for a mistake before anything is written.
    """
    from compress.config.compose import searched_folders
    from compress.data.shared import DataSets
    from compress.paths import searching
    from compress.pipeline.check import checked_jobs
    from compress.pipeline.execute import execute, resumed_job
    from compress.pipeline.given import check_given, overrides_for
    from compress.pipeline.resume import chosen, run_directory

    data_sets = DataSets()
    networks = {role: given for role, given in (("student", student), ("teacher", teacher)) if given is not None}
    with searching(searched_folders(overrides, config_dir)):
        if any(override.startswith("resume=") for override in overrides):
            directory, allowed, others = chosen(overrides)
            check_given(directory, networks, allowed)
            return execute(resumed_job(directory, others, data_sets, networks, allowed), directory, data_sets)
        overrides = [*overrides, *overrides_for(networks, overrides)]
        [job] = checked_jobs(overrides, data_sets=data_sets, networks=networks)
        return execute(job, run_directory(job, overrides), data_sets)


def quantize(
    network: "nn.Module", images: Any, bits: int | None = None, quantizer: str = "gpfq", **keys: Any
) -> "QuantizedNetwork":
    """Quantizes any `network` on some `images`, without training; see `compress.pipeline.own_module.quantize`.

    `quantize(network, images, rates=2).save("net.safetensors")`, or `bits=3`; images are normalised as the network
    takes them. `class_names=`, `mean=` and `standard_deviation=` are for its files. Raises `compress.errors.UserError`
    for a mistake.
    """
    from compress.pipeline import own_module

    return own_module.quantize(network, images, bits, quantizer, **keys)


def load(path: str | Path, network: Any = None) -> tuple[Any, dict[str, Any]]:
    """(network, description) of a model file: `load("net.safetensors", network=MyNet())` for a class of one's own.

    See `compress.pipeline.own_module.load`.
    """
    from compress.pipeline import own_module

    return own_module.load(path, network)
