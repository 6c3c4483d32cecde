"""On how many threads a training computes."""

import json

import pytest
import torch

import compress
from compress.training.threads import MACS_PER_THREAD, threads_for


@pytest.fixture
def four_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("macs", "threads"), [(0, 1), (MACS_PER_THREAD, 1), (2 * MACS_PER_THREAD, 2), (100 * MACS_PER_THREAD, 4)]
)
def test_threads_follow_from_the_work_of_a_batch(four_threads, macs, threads):
    with threads_for(macs):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 4


def test_who_sets_omp_num_threads_has_chosen(four_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with threads_for(0):
        assert torch.get_num_threads() == 4


@pytest.mark.slow
def test_a_small_network_is_trained_on_one_thread(four_threads, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["student=resnet8", "teacher=resnet8", "teacher.training.epochs=1", "data.limit=100"]
    result = compress.run([*options, "trainer.max_epochs=1", "quantizer=none"])
    record = json.loads((result.directory / "result.json").read_text())
    assert record["hardware"]["threads"] == 1
    assert torch.get_num_threads() == 4
