"""What a run ran on: versions, commit and hardware."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from compress.cpu import features, processor
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
IN_FILES = ("python", "compress", "torch", "commit")


def surroundings(threads: int | None = None, precision: str | None = None) -> dict[str, Any]:
    """`versions` and `hardware` of `compress.results.record.Record`.

    `threads` and `precision` are those of the training, if any.
    """
    return {
        "versions": versions(),
        "hardware": {
            "processor": processor(),
            "features": features(),
            "cores": os.cpu_count(),
            "threads": threads or torch.get_num_threads(),
            "precision": precision,
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def versions() -> dict[str, str | None]:
    """Python, the packages that decide the numbers, and the checkout's commit."""
    installed = {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES}
    # With the build, such as +cu130, which the installed package does not name.
    return installed | {"torch": torch.__version__, "commit": commit()}


def versions_in_files() -> dict[str, str]:
    """Those that a model file names, where every byte counts; the record of the run has all."""
    return {name: value for name, value in versions().items() if name in IN_FILES and value is not None}


def _version(package: str) -> str | None:
    """None for what was not installed, such as this package where it is run from a folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def commit() -> str | None:
    """The checkout's commit, with `-dirty` where it was changed since; None outside a checkout."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    command = ["git", "-C", str(PACKAGE.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
