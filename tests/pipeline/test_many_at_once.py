"""Several commands in one folder at the same time: each does what it would do alone, or says who was first."""

import json
from pathlib import Path

import pytest
from processes import Script
from waiting import wait_for

SCRIPTS = Path(__file__).parents[2] / "scripts"
RUN = [
    *("method=kd", "student=resnet8", "teacher=resnet8", "teacher.training.epochs=1", "trainer.max_epochs=2"),
    *("data.limit=100", "quantizer.bits=[4]", "quantizer.calibration_images=16", "trainer.log_every=0"),
]
CHECKPOINT = "checkpoints/last.ckpt"


def start(folder, *arguments, script="run.py"):
    return Script(SCRIPTS / script, *arguments, folder=folder)


def outcome(directory):
    rows = json.loads((directory / "result.json").read_text())["tradeoff"]
    rows = [{name: row[name] for name in row if not name.startswith(("latency", "speedup"))} for row in rows]
    return rows, [path.read_bytes() for path in sorted(directory.glob("models/*"))]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(6, marks=pytest.mark.soak)])
def test_runs_at_once_share_a_teacher_and_nothing_else(tmp_path, count):
    runs = [start(tmp_path, *RUN) for _ in range(count)]
    assert [(run.wait(), run.said()[1]) for run in runs] == [(0, "")] * count
    directories = sorted((tmp_path / "outputs/runs").iterdir())
    assert len(directories) == count
    assert all(outcome(directory) == outcome(directories[0]) for directory in directories)
    assert len(list((tmp_path / "outputs/teachers").glob("*.safetensors"))) == 1


@pytest.mark.slow
def test_of_two_that_go_on_with_a_run_one_does(tmp_path):
    assert start(tmp_path, *RUN, "hydra.run.dir=whole").wait() == 0
    killed = start(tmp_path, *RUN, "hydra.run.dir=run")
    wait_for((tmp_path / "run" / CHECKPOINT).exists, killed.poll)
    killed.kill()
    killed.wait()
    both = [start(tmp_path, "resume=run") for _ in range(2)]
    ends = sorted((process.wait(), process.said()[1]) for process in both)
    assert ends[0] == (0, "")
    assert ends[1][0] in (0, 2)
    assert len(ends[1][1].splitlines()) == (ends[1][0] == 2)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.soak
def test_a_report_may_be_written_while_a_sweep_runs(tmp_path):
    sweep = start(tmp_path, "-m", "seed=1,2,3,4", *RUN, "hydra.sweep.dir=outputs/sweep")
    wait_for((tmp_path / "outputs/sweep/0/result.json").exists, sweep.poll)
    reports = 0
    while sweep.poll() is None:
        report = start(tmp_path, "outputs", "-o", "report.html", script="report.py")
        assert report.wait() == 0
        assert all(line.startswith("note: ") for line in report.said()[1].splitlines())
        reports += 1
    assert (sweep.wait(), sweep.said()[1]) == (0, "")
    assert reports > 1
