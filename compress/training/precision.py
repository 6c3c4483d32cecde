"""Whether networks train faster under bfloat16 autocast than in float32: some steps of each, timed.

A processor that computes in bfloat16 gains on large convolutions, and may lose on small ones what the conversions cost.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from compress.cuda_graph import Recorded
from compress.methods.step_graph import WARMING
from compress.models.memory_format import lay_out

# As trainer.precision has them.
FLOAT32, BFLOAT16 = "32-true", "bf16-mixed"
# So many times as fast as in float32 a step has to be for bfloat16.
GAIN = 1.05
# Steps of each, of which the first warms up, and after how many seconds no further ones are begun.
STEPS = 40
SECONDS = 2.0


def faster(speedup: float) -> str:
    """The value of trainer.precision for networks whose step bfloat16 makes `speedup` times as fast."""
    return BFLOAT16 if speedup >= GAIN else FLOAT32


def speedup_of_bfloat16(
    networks: Sequence[nn.Module],
    batch_size: int,
    input_shape: tuple[int, int, int],
    device: torch.device,
    replayed: bool = False,
) -> float:
    """How many times as fast a step of all `networks` is under bfloat16 autocast: the ratio of the median times.

    A step is forward and backward for random images of `input_shape`, (C, H, W), as training lays them out. Steps of
    both kinds take turns, so that whatever else the machine does slows both. On a GPU they are `replayed`, where they
    can be, as those of the training are. The networks are used up: they are moved to `device`, and their BatchNorm has
    other statistics. Random numbers are drawn from the global generator.
    """
    images = torch.randn(batch_size, *input_shape, device=device).contiguous(memory_format=torch.channels_last)
    for network in networks:
        lay_out(network.to(device).train(), input_shape)
    pairs: list[tuple[float, float]] = []
    steps: list[Callable[[], object]] = [partial(_step, networks, autocast, images) for autocast in (False, True)]
    if replayed:
        for step in WARMING * steps:
            step()
        with suppress(RuntimeError):
            steps = [
                partial(Recorded(partial(_step, networks, autocast), images), images) for autocast in (False, True)
            ]
    started = time.perf_counter()
    while len(pairs) < 2 or (len(pairs) < STEPS and time.perf_counter() - started < SECONDS):
        float32, bfloat16 = (_seconds(step, images.device) for step in steps)
        pairs.append((float32, bfloat16))
    float32, bfloat16 = (median(times) for times in zip(*pairs[1:], strict=True))
    speedup: float = float32 / bfloat16
    return speedup


def _step(networks: Sequence[nn.Module], autocast: bool, images: Tensor) -> None:
    for network in networks:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            logits: Tensor = network(images)
        logits.float().square().mean().backward()
        network.zero_grad()


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """The time of one step."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
