"""Where `trainer.precision=auto` becomes a value: bfloat16 autocast if the processor has it and a timed step gains.

The decision is kept beside the teachers, as `precision-<hash>.json`, so that all runs of the same networks on the same
processor train alike, and written to `config.yaml`, so that a resumed run goes on as it began, wherever it does.
"""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import torch
from rich.markup import escape
from torch import nn
from yaml import YAMLError

from compress import models, yaml_file
from compress.checksums import digest, read_text
from compress.config.compose import Job
from compress.config.ranges import Precision
from compress.cpu import processor
from compress.data.shared import DataSets
from compress.errors import UserError, first_line
from compress.files import read_json, write_json
from compress.models import low_precision_dtype
from compress.pipeline.parts import Parts
from compress.progress import console
from compress.stopping import raise_if_stopped
from compress.training.precision import BFLOAT16, FLOAT32, faster, speedup_of_bfloat16
from compress.training.processes import processes
from compress.training.threads import MACS_PER_THREAD, threads_for

AUTO = "auto"
# Multiply-accumulates of a batch, forward, below which conversions cost a CPU more than bfloat16 gains.
LEAST_WORK = MACS_PER_THREAD


def settle(jobs: Sequence[Job], directory: Path, data_sets: DataSets) -> None:
    """Puts a value in the place of `auto` in the `jobs` that train in `directory`, a run and its stages.

    It is that of the run which was begun there, if any, otherwise what is decided for the first of them; a line says
    it. What was typed stays.
    """
    undecided = [job for job in jobs if job.config.trainer.precision == AUTO]
    if not undecided:
        return
    precision, reason = _recorded(directory), ""
    if precision is None:
        first = undecided[0]
        precision, reason = decide(Parts(first.config, data_sets, networks=first.networks))
    console.print(escape(f"precision {precision}{reason}"), style="bold")
    for job in undecided:
        job.config.trainer.precision = precision


def decide(parts: Parts) -> tuple[str, str]:
    """The precision in which the student of `parts`, which are used up by it, is to train, and why, to be printed.

    The decision that was kept, or one that is kept now. The state of the random numbers stays as it is.
    """
    device = parts.device
    if low_precision_dtype(device) is None:
        return FLOAT32, ": the processor has no bf16"
    if parts.plain["trainer"]["gradient_clip_val"] is not None and parts.plain["optimizer"].get("fused"):
        return FLOAT32, ": trainer.gradient_clip_val allows bf16 with optimizer.fused=false"
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=forked):
        work = _macs(parts) * parts.data.batch_size
    if device.type == "cpu" and work < LEAST_WORK:
        return FLOAT32, ": a step is too small for bf16 to pay"
    with torch.random.fork_rng(devices=forked), threads_for(work) as threads:
        networks = _networks(parts)
        share = min(parts.data.batch_size, len(parts.data.splits["train"])) // processes(parts.plain["trainer"])
        identity = {
            "networks": sorted(networks),
            "input_shape": list(parts.data.input_shape),
            "batch_size": share,
            "threads": threads,
            "processor": _identity(device),
            "torch": torch.__version__,
        }
        # The batches of a method that blends or takes turns are not replayed; that is not told apart here.
        replayed = device.type == "cuda" and parts.plain["trainer"].get("cuda_graph", True)
        if replayed:
            identity["cuda_graph"] = True
        name = f"precision-{digest(json.dumps(identity, sort_keys=True))[:12]}.json"
        path = Path(parts.plain["output_directory"]) / "teachers" / name
        speedup = _kept(path, identity)
        if speedup is None:
            try:
                speedup = speedup_of_bfloat16([*networks.values()], share, parts.data.input_shape, device, replayed)
            except Exception as failure:  # a class of the user's can fail with anything
                raise_if_stopped()
                return FLOAT32, f": a step with bf16 fails ({type(failure).__name__}: {first_line(failure)})"
            # Of two jobs that timed it at once, the one that comes later goes by the other's.
            speedup = _keep(path, identity, speedup)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    precision = faster(speedup)
    if precision == BFLOAT16:
        return precision, f": {speedup:.2g} times as fast as float32 in a timed step"
    return precision, f": bf16 would be {speedup:.2g} times as fast"


def _networks(parts: Parts) -> dict[str, nn.Module]:
    """One network of each architecture that learns, by all that is known of it, as JSON."""
    networks = {}
    for network, architecture in zip([parts.student, *parts.peers], parts.architectures.values(), strict=True):
        # Of a class of the user's the code may have changed, which the options do not tell.
        size = [models.count_parameters(network), models.count_macs(network, parts.data.input_shape)]
        networks[json.dumps([architecture, *size], sort_keys=True, default=str)] = network
    return networks


def _macs(parts: Parts) -> int:
    """Multiply-accumulates of an image, forward, of all networks of the training."""
    learning = [parts.student, *parts.peers]
    networks = (*learning, *map(parts.teacher_network, parts.teacher_keys))
    return sum(models.count_macs(network, parts.data.input_shape) for network in networks)


def _identity(device: torch.device) -> str:
    """What of the processor decides how fast it is in either precision."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
    # Earlier PyTorch has no such function.
    capabilities: dict[str, Any] = dict(getattr(torch.cpu, "get_capabilities", dict)())
    return f"{processor()} {digest(json.dumps(capabilities, sort_keys=True))[:12]}"


def _kept(path: Path, identity: dict[str, Any]) -> float | None:
    """The speedup that was kept for exactly `identity`; None where there is none, or the file is damaged."""
    with suppress(UserError):
        content = read_json(path, "to remove it")
        speedup = content.get("speedup")
        if isinstance(speedup, float) and math.isfinite(speedup) and content == identity | {"speedup": speedup}:
            return speedup
    return None


def _keep(path: Path, identity: dict[str, Any], speedup: float) -> float:
    """Keeps `speedup`, or returns what another job has kept meanwhile."""
    kept = _kept(path, identity)
    if kept is not None:
        return kept
    # A run whose directory lies elsewhere needs no such folder.
    with suppress(OSError):
        write_json(path, identity | {"speedup": speedup})
    return speedup


def _recorded(directory: Path) -> str | None:
    """The precision in the config.yaml of a run that was begun in `directory`; None where there is none."""
    with suppress(OSError, UnicodeDecodeError, YAMLError, UserError, KeyError, TypeError):
        precision = yaml_file.load(read_text(directory / "config.yaml"))["trainer"]["precision"]
        if precision in get_args(Precision):
            return str(precision)
    return None
