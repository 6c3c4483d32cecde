"""What the command line, `compress.run`, sweeps, stages and resumed runs have in common, each done once."""

import logging
import sys
from pathlib import Path

import pytest

import compress
from compress.cli import main
from compress.config import compose, values
from compress.data.digits import Digits
from compress.data.shared import DataSets
from compress.pipeline import check
from compress.pipeline.check import checked_jobs

SMALL = ["student=resnet8", "data.limit=200", "trainer.max_epochs=1", "trainer.log_every=0", "quantizer=none"]
TEACHER = ["teacher=resnet8", "teacher.training.epochs=1", "teacher.training.batch_size=32"]


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """An empty working directory, and a list with an entry for each time that the digits are read."""
    monkeypatch.chdir(tmp_path)
    counted = []
    read = Digits.read

    def counting(self):
        counted.append(self)
        return read(self)

    monkeypatch.setattr(Digits, "read", counting)
    return counted


@pytest.mark.slow
def test_a_run_reads_its_data_once_for_the_check_the_teacher_and_the_student(reads):
    compress.run(["method=kd", *TEACHER, *SMALL])
    assert len(reads) == 1


@pytest.mark.slow
def test_the_check_of_a_sweep_reads_them_once(reads):
    jobs = checked_jobs(["method=kd,dkd", "seed=0,1,2,3", *TEACHER, *SMALL], multirun=True, data_sets=DataSets())
    assert len(jobs) == 8
    assert len(reads) == 1


@pytest.mark.slow
def test_a_sweep_in_one_process_reads_them_once(reads):
    assert main(["-m", "seed=0,1", "method=supervised", *SMALL]) == 0
    assert len(reads) == 1


@pytest.mark.slow
def test_a_run_of_three_stages_reads_them_once(reads):
    stages = ", ".join(f"{{name: {name}, overrides: ['seed={seed}']}}" for seed, name in enumerate("abc"))
    compress.run(["method=supervised", *SMALL, f"stages=[{stages}]"])
    assert len(reads) == 1


def test_each_job_is_composed_and_its_values_are_checked_once(reads, monkeypatch):
    composed, checked = [], []
    compose_job, check_values = compose.compose_job, values.check_values
    monkeypatch.setattr(compose, "compose_job", lambda *typed: composed.append(typed) or compose_job(*typed))
    monkeypatch.setattr(check, "check_values", lambda config: checked.append(config) or check_values(config))
    assert main(["method=supervised", *SMALL, "--dry-run"]) == 0
    assert (len(composed), len(checked)) == (1, 1)


@pytest.mark.slow
def test_a_run_from_python_leaves_the_log_of_the_command_line_and_the_callers_logging_alone(reads):
    assert main(["method=supervised", *SMALL, "hydra.run.dir=typed"]) == 0
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    result = compress.run(["method=supervised", *SMALL])
    assert {path.name for path in result.directory.iterdir()} == {path.name for path in Path("typed").iterdir()}
    assert (result.directory / "run.log").is_file()
    assert (list(root.handlers), root.level) == (handlers, level)


@pytest.mark.slow
def test_hydras_callbacks_and_its_change_of_directory_work(reads, tmp_path):
    names = ("on_run_start", "on_run_end", "on_job_start", "on_job_end")
    hooks = "\n".join(f"    def {name}(self, **others): calls.append('{name}')" for name in names)
    Path("watching.py").write_text(
        f"from hydra.experimental.callback import Callback\ncalls = []\nclass Watching(Callback):\n{hooks}\n"
    )
    watching = "+hydra.callbacks.watching._target_=watching.Watching"
    assert main(["method=supervised", *SMALL, watching, "hydra.job.chdir=true", "hydra.run.dir=run"]) == 0
    assert (tmp_path / "run" / "result.json").is_file()
    assert sys.modules["watching"].calls == ["on_run_start", "on_job_start", "on_job_end", "on_run_end"]


@pytest.mark.slow
def test_a_log_file_of_the_callers_goes_on_after_a_run_from_python(reads, tmp_path):
    handler = logging.FileHandler(tmp_path / "mine.log", mode="w")
    logging.getLogger().addHandler(handler)
    try:
        compress.run(["method=supervised", *SMALL])
        logging.getLogger("mine").warning("after it")
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    assert "after it" in (tmp_path / "mine.log").read_text()
