"""`result.json`: what ran, on what, how long it took and what came out.

| key | meaning |
|---|---|
| format | 1 |
| overrides | what was typed, beside the defaults; the whole configuration is in config.yaml |
| versions | Python and the packages that decide the numbers; `commit`: of the checkout, null outside one |
| hardware | processor, cores, threads of the training, memory in GB, accelerator |
| seed, started | the seed; the local time at the start |
| slurm_job | the number of the SLURM job, under SLURM |
| seconds | durations of the parts; of a resumed run, those after the last resuming |
|  | `distributed`: the training in several processes, the teacher's too, with trainer=ddp |
| data | name, class names, number of images in train, validation and test, input shape |
| teacher | null, or model, file, parameters, MACs, accuracies (0..1), per-class accuracy on test, as it was found; |
|  | of one that learned on, `validation_accuracy_after`; of an ensemble, `members`: such records without test |
| pruning | null, or `recipe` and: of masks, numbers of weights and of pruned ones, also per layer, and why other |
|  | layers are dense; of structured pruning, the channels of each layer |
| student | model, network (`others.0` for the first other peer of dml), parameters, MACs, epochs, best epoch,
|  | accuracies (0..1), per-class accuracy on test |
| stages | of a run in stages, what each was and left, `variant` being its last row; the rest is the last one's |
| tradeoff | the rows of tradeoff.csv |
| layers | for each packed file: bits, levels, relative output error and encoding (dense or bitmap) of each quantized |
|  | layer; the layers left float |
"""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from compress.paths import PACKAGE

PACKAGES = (
    "compress",
    "torch",
    "torchvision",
    "pytorch-lightning",
    "hydra-core",
    "numpy",
    "scikit-learn",
    "safetensors",
)


def surroundings() -> dict[str, Any]:
    """Versions, commit and hardware, for `result.json`."""
    versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    # With the build, such as +cu130, which the installed package does not name.
    versions["torch"] = torch.__version__
    return {
        "versions": versions | {"commit": commit()},
        "hardware": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def commit() -> str | None:
    """The checkout's commit, with `-dirty` where it was changed since; None outside a checkout."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    command = ["git", "-C", str(PACKAGE.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
