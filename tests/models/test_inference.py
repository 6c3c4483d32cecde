"""Networks made ready to be called as fixed functions, and the precision in which a device runs them."""

import platform
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.models import build, frozen_for_inference, inference, low_precision_dtype


def exercised(stem):
    """A network whose BatchNorm has statistics and gains of its own, as after training."""
    torch.manual_seed(0)
    model = build(stem, 10)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        for _ in range(3):
            model(torch.randn(16, 3, 16, 16))
    return model


@pytest.mark.parametrize(("stem", "left"), [("resnet20", 0), ("resnet18", 0), ("wrn_16_2", 6)])
def test_the_frozen_copy_gives_the_same_logits_without_batch_norm_and_gradients(stem, left):
    model, images = exercised(stem), torch.randn(8, 3, 16, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frozen = frozen_for_inference(model, (3, 16, 16))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    # In a pre-activation network the norms that follow a sum stay: those of five blocks and the last.
    assert sum(isinstance(module, nn.BatchNorm2d) for module in frozen.modules()) == left
    assert frozen.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(frozen(images), model(images), rtol=1e-4, atol=1e-4)


class Branching(nn.Module):
    """A forward that torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, images):
        maps = self.norm(self.conv(images))
        return maps.mean((2, 3)) if maps.sum() > 0 else maps.amax((2, 3))


def test_a_network_that_cannot_be_traced_is_frozen_without_folding():
    model = Branching()
    frozen = frozen_for_inference(model, (3, 16, 16))
    assert isinstance(frozen.norm, nn.BatchNorm2d)
    assert not frozen.norm.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert model.conv.weight.requires_grad
    assert model.training


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="reads an x86 Linux /proc/cpuinfo"
)
def test_the_cpu_is_used_in_bfloat16_only_where_its_flags_say_so():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    expected = torch.bfloat16 if flags & {"avx512_bf16", "amx_bf16"} else None
    assert low_precision_dtype("cpu") is expected


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True, "avx2": True}, None),
        ({"architecture": "aarch64"}, None),
    ],
)
def test_the_capabilities_of_the_cpu_decide(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert low_precision_dtype(torch.device("cpu")) is expected


@pytest.mark.parametrize(("answer", "expected"), [(True, torch.bfloat16), (False, None)])
def test_an_older_torch_is_asked_by_its_private_query(answer, expected, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: answer, raising=False)
    assert low_precision_dtype("cpu") is expected
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert inference.low_precision_dtype("cpu") is None


def test_a_device_that_is_absent_or_of_another_kind_has_no_low_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert low_precision_dtype("cuda") is None
    assert low_precision_dtype("mps") is None
