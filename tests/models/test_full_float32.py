"""What is compared and measured is computed in float32, and with cuDNN where that was on."""

import pytest
import torch

from compress.models.inference import full_float32


@pytest.mark.parametrize("enabled", [True, False])
def test_only_tf32_is_switched_off_and_everything_comes_back(enabled):
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=enabled, benchmark=True, deterministic=True, allow_tf32=True):
        with full_float32():
            inside = cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
        outside = cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    assert inside == (enabled, True, True, False)
    assert outside == (enabled, True, True, True)


def test_what_is_repeatable_chooses_no_algorithm_by_its_time():
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=True, benchmark=True, deterministic=False):
        with full_float32(repeatable=True):
            inside = cudnn.benchmark, cudnn.deterministic
        outside = cudnn.benchmark, cudnn.deterministic
    assert (inside, outside) == ((False, True), (True, False))
