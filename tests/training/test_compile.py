"""`trainer.compile=true` trains the same network, or says that it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import stopped_in_the_second_epoch
from torch import nn

import compress
from compress.cli import main
from compress.errors import UserError
from compress.training.compiling import CACHE, compile_networks

RUN = ["data.limit=100", "data.batch_size=16", "trainer.max_epochs=2", "trainer.accelerator=cpu", "quantizer=none"]
RUN += ["export=packed", "trainer.log_every=0"]
SCRIPT = Path(__file__).parents[2] / "scripts" / "run.py"
COMPILED = "trainer.compile=true"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def small():
    """Few layers, for a compiler works seconds on each."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


def weights(directory):
    saved = torch.load(Path(directory) / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)
    return saved["state_dict"]


@pytest.mark.slow
def test_a_compiled_training_is_close_to_the_other_and_is_resumed_bit_for_bit():
    typed = ["method=supervised", "optimizer=sgd", *RUN]  # whose steps are as close as the gradients
    plain = compress.run([*typed, "hydra.run.dir=plain"], student=small())
    whole = compress.run([*typed, COMPILED, "hydra.run.dir=whole"], student=small())
    assert weights("whole").keys() == weights("plain").keys()
    for name, value in weights("whole").items():
        torch.testing.assert_close(value, weights("plain")[name], rtol=1e-2, atol=1e-3)
    assert whole.rows[0].accuracy_on("test") == pytest.approx(plain.rows[0].accuracy_on("test"), abs=0.05)
    with stopped_in_the_second_epoch(), pytest.raises(UserError, match="stopped"):
        compress.run([*typed, COMPILED, "hydra.run.dir=half"], student=small())
    compress.run(["resume=half"], student=small())
    assert all(torch.equal(value, weights("half")[name]) for name, value in weights("whole").items())


@pytest.mark.slow
def test_what_the_compiler_cannot_do_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "false")  # which PyTorch reads when it is imported: a process of its own
    monkeypatch.setenv(CACHE, str(tmp_path / "compiled"))
    command = [sys.executable, SCRIPT, "method=supervised", "student=resnet8", *RUN, COMPILED]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    [line] = process.stderr.splitlines()
    assert line.startswith("error: trainer.compile: found true, but PyTorch cannot compile the student (")
    assert line.endswith("; accepted: false")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("typed", "compilers", "message"),
    [
        (["method=at"], True, "reads features inside the networks; accepted: false"),
        (["method=supervised"], False, "no C++ compiler; accepted: false, or CXX=COMPILER"),
    ],
)
def test_where_it_cannot_work_it_is_refused_in_one_line(typed, compilers, message, monkeypatch, capsys):
    if not compilers:
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
    assert main([*typed, "student=resnet8", *RUN, COMPILED]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: trainer.compile: found true")
    assert message in line


def test_a_process_compiles_in_a_folder_of_its_own_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv(CACHE, raising=False)
    compile_networks([small()])
    own = Path(os.environ[CACHE])
    assert own.is_dir()
    compile_networks([small()])
    assert os.environ[CACHE] == str(own)
    monkeypatch.setenv(CACHE, str(tmp_path))
    compile_networks([small()])
    assert os.environ[CACHE] == str(tmp_path)
