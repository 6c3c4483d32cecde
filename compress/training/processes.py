"""Which processes train together, for those that do and for whatever has to know."""

import os
import signal
from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from omegaconf import DictConfig
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from compress.errors import UserError
from compress.models.outputs import has_idle_parameters
from compress.progress import console

# Set for the processes that train together, and the folder where one says why it failed.
FAILURES = "COMPRESS_FAILURES"


def is_wanted(trainer: Mapping[str, Any]) -> bool:
    return bool(trainer.get("strategy", "auto") == "ddp")


def is_worker() -> bool:
    """Whether this process is one of those that train together."""
    return FAILURES in os.environ


def processes_here(trainer: Mapping[str, Any]) -> int:
    """How many processes train on this machine under these options."""
    if trainer["devices"] != "auto":
        devices: int = trainer["devices"]
        return devices
    return torch.cuda.device_count() if trainer["accelerator"] != "cpu" and torch.cuda.is_available() else 1


def processes(trainer: Mapping[str, Any]) -> int:
    """How many processes train together."""
    return processes_here(trainer) * trainer.get("num_nodes", 1) if is_wanted(trainer) else 1


def node_rank(trainer: Mapping[str, Any]) -> int:
    """The number of this machine among those that train together; the first does everything else."""
    if not is_wanted(trainer) or trainer.get("num_nodes", 1) == 1:
        return 0
    key = next((variable for variable in ("NODE_RANK", "SLURM_NODEID") if variable in os.environ), None)
    rank = os.environ[key] if key else "0"
    if not rank.isdecimal() or int(rank) >= trainer["num_nodes"]:
        raise UserError(f"{key}: found {rank!r}; accepted: 0 to {trainer['num_nodes'] - 1}, below trainer.num_nodes")
    return int(rank)


def act_alone() -> None:
    """This process logs and writes, whatever number a launcher such as srun has given it."""
    rank_zero_only.rank = 0  # type: ignore[attr-defined]  # Lightning keeps it there


def lightning_options(trainer: Mapping[str, Any], networks: Iterable[nn.Module], input_shape: Any) -> dict[str, Any]:
    """Arguments of Lightning's Trainer: all processes in one that trains with others, and one process anywhere else.

    `networks` are those that learn from images of `input_shape`, `(C, H, W)`.
    """
    if not is_worker():
        # Not SLURM's environment: it answers signals with a checkpoint within the epoch, which would not go on exactly.
        alone = {"devices": 1, "num_nodes": 1, "strategy": "auto", "sync_batchnorm": False}
        return {key: value for key, value in alone.items() if key in trainer} | {"plugins": [LightningEnvironment()]}
    return {
        "devices": processes_here(trainer),
        # DDP would wait for the gradients of a head that the logits do not depend on.
        "strategy": DDPStrategy(
            find_unused_parameters=any(has_idle_parameters(network, input_shape) for network in networks)
        ),
        "use_distributed_sampler": False,
        "plugins": [TorchElasticEnvironment()],
    }


class Worker(pl.Callback):
    """What is different in a process that trains with others, once Lightning has made its own arrangements."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ignore_signals()
        console.quiet = not trainer.is_global_zero


def ignore_signals() -> None:
    """The job decides when its processes end; a signal that SLURM sends to all of them reaches it, too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def check(config: DictConfig, images: Mapping[str, int], has_peers: bool) -> None:
    """Raises UserError where the processes that `trainer` asks for cannot train; `images`: how many each split has."""
    trainer = config.trainer
    if not is_wanted(trainer):
        for key in ("devices", "num_nodes"):
            if trainer.get(key, 1) != 1:
                raise UserError(
                    f"trainer.{key}: found {trainer[key]}; accepted: 1, or trainer=ddp for several processes"
                )
        if trainer.get("sync_batchnorm"):
            raise UserError("trainer.sync_batchnorm: found true for one process; accepted: false, or trainer=ddp")
        return
    on_gpu = trainer.accelerator != "cpu" and torch.cuda.is_available()
    if on_gpu and processes_here(trainer) > torch.cuda.device_count():
        raise UserError(
            f"trainer.devices: found {trainer.devices}, but {torch.cuda.device_count()} GPUs; accepted: auto, or fewer"
        )
    if trainer.get("sync_batchnorm") and not on_gpu:
        raise UserError("trainer.sync_batchnorm: found true without a GPU, where PyTorch has none; accepted: false")
    if has_peers:
        raise UserError("trainer.strategy: found ddp for a method with peers; accepted: auto, or another method")
    count, batch = processes(trainer), config.data.batch_size
    if batch % count or batch < 2 * count or batch > images["train"]:
        raise UserError(
            f"data.batch_size: found {batch} for {count} processes, which share it, and {images['train']} training "
            f"images; accepted: a multiple of {count}, from {2 * count} to {images['train'] // count * count}"
        )
    if images["validation"] < count:
        raise UserError(f"trainer.devices: found {count} processes for {images['validation']} validation images")
