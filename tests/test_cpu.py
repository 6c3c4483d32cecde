"""The processor: what it can do, and whether integers of 8 bits are multiplied rightly on it."""

import platform

import pytest
import torch

from compress import cpu


@pytest.mark.parametrize(
    ("machine", "capabilities", "holds"),
    [
        ("x86_64", {"avx2": True, "avx512_vnni": False}, False),
        ("x86_64", {"avx512_vnni": True}, True),
        ("AMD64", {"avx_vnni": True}, True),
        ("AMD64", {}, False),
        ("aarch64", {"dotprod": False}, True),
    ],
)
def test_sums_of_products_saturate_on_x86_before_vnni(machine, capabilities, holds, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert cpu.sums_hold() == holds


def test_features_are_those_that_the_processor_has(monkeypatch):
    found = {"cpu_name": "a name", "l2_cache_size": 1, "amx_int8": True, "avx512_bf16": False, "avx2": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert cpu.features() == ["amx_int8", "avx2"]
