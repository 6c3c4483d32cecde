"""Distil, prune and quantize image classifiers: the most accuracy per byte, and the file."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# PyTorch's threads read this when PyTorch is imported. They wait awake for their next operation, a thirtieth as long as
# they would by themselves: enough within a training step, and beside other jobs it does not keep cores from them.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if TYPE_CHECKING:
    from torch import nn

    from compress.pipeline.own_module import QuantizedNetwork
    from compress.pipeline.run import Result


def run(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> "Result":
    """Does one run from Python as the command line would: `compress.run(["method=dkd", "student=resnet18"])`.

    Paths such as `output_directory` are relative to the working directory; `config_dir` is a folder of YAML groups of
    your own, laid out as `conf/`. Raises `compress.errors.UserError` for a mistake before anything is written.
    """
    from compress.config.compose import searched_folders
    from compress.data.shared import DataSets
    from compress.paths import searching
    from compress.pipeline.check import checked_jobs
    from compress.pipeline.execute import execute
    from compress.pipeline.resume import run_directory

    data_sets = DataSets()
    with searching(searched_folders(overrides, config_dir)):
        [job] = checked_jobs(overrides, data_sets=data_sets)
        return execute(job, run_directory(job, overrides), data_sets)


def quantize(
    network: "nn.Module", images: Any, bits: int | Sequence[int] = 4, quantizer: str = "gpfq", **keys: Any
) -> "QuantizedNetwork":
    """Quantizes any `network` on some `images`, without training; see `compress.pipeline.own_module.quantize`.

    `quantize(network, images, bits=3, quantizer="gptq").save("net.safetensors")`; images are normalised as the network
    takes them. Raises `compress.errors.UserError` for a mistake.
    """
    from compress.pipeline import own_module

    return own_module.quantize(network, images, bits, quantizer, **keys)


def load(path: str | Path, network: Any = None) -> tuple[Any, dict[str, Any]]:
    """(network, description) of a model file: `load("net.safetensors", network=MyNet())` for a class of one's own.

    See `compress.pipeline.own_module.load`.
    """
    from compress.pipeline import own_module

    return own_module.load(path, network)
