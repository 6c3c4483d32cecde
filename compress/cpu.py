"""The CPU: its name, what it can do, and whether it multiplies integers of 8 bits rightly."""

import platform
from pathlib import Path

import torch


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def features() -> list[str]:
    """What the CPU can do beyond its first models, by PyTorch's names: avx512_vnni, amx_int8, avx512_bf16 and others.

    These instructions decide which of float32, bfloat16 and integers is the fastest.
    """
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return sorted(name for name, present in capabilities.items() if present is True)


def sums_hold() -> bool:
    """Whether the CPU adds products of uint8 and int8 without saturating at int16, as x86 does before VNNI."""
    return platform.machine().lower() not in ("x86_64", "amd64") or bool({"avx512_vnni", "avx_vnni"} & {*features()})
