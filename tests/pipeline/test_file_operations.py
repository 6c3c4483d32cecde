"""A run that is killed, or finds the disk full, at any of its operations on files goes on to the undisturbed result."""

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from faults import performed
from processes import PROCESSES

DIRECTORY = Path("outputs/runs/one")
PARTS = 8  # of the operations, so that processes of tests can share them
# Small, because there are hundreds of such runs.
NETWORK = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, num_classes))
"""
RUN = [
    *("student=module", "student.target=net.Net", "teacher=module", "teacher.model.target=net.Net"),
    *("method=kd", "teacher.training.epochs=1", "trainer.max_epochs=2"),
    *("data.limit=100", "quantizer.bits=[4]", "quantizer.calibration_images=16", "export=onnx", "logger=csv"),
    f"hydra.run.dir={DIRECTORY}",
]


def outcome(folder):
    """What has to be equal to the last bit; figures of time are left out."""
    directory = folder / DIRECTORY
    record = json.loads((directory / "result.json").read_text())
    rows = [
        {name: row[name] for name in row if not name.startswith(("latency", "speedup"))} for row in record["tradeoff"]
    ]
    files = [*directory.glob("models/*"), *folder.glob("outputs/teachers/*.safetensors"), directory / "metrics.csv"]
    saved = torch.load(directory / "checkpoints" / "best.ckpt", map_location="cpu", weights_only=True)
    return {
        "rows": rows,
        "layers": record["layers"],
        "files": {path.name: path.read_bytes() for path in files},
        "weights": {name: value.numpy().tobytes() for name, value in saved["state_dict"].items()},
        "left": sorted(path.relative_to(folder).as_posix() for path in folder.glob("outputs/**/*") if path.is_file()),
    }


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The outcome of a run that nothing disturbs, and how many operations on files it takes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "net.py").write_text(NETWORK)
    receive, send = PROCESSES.Pipe(duplex=False)
    assert performed(RUN, folder, math.inf, True, send)[0] == 0
    return outcome(folder), receive.recv()


def disturbed(folder, moment, kill, expected):
    """A run disturbed at its operation `moment` says so, if it can, and goes on by the same command or `resume=`."""
    folder.mkdir()
    (folder / "net.py").write_text(NETWORK)
    code, errors = performed(RUN, folder, moment, kill)
    if kill:
        assert code == -signal.SIGKILL
    elif code == 0:  # nothing but removing was left to do, which needs no room
        assert (errors, outcome(folder)) == ("", expected)
    else:
        assert (code, errors.count("\n")) == (1, 1), errors
        assert "No space left on device" in errors
        assert "to go on after that: " in errors
    code, errors = performed(RUN, folder)
    if code == 2:
        assert f"resume={DIRECTORY}" in errors
        code, errors = performed([f"resume={DIRECTORY}", "allow_targets=[net.Net]"], folder)
    assert (code, errors) == (0, "")
    assert outcome(folder) == expected
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("kill", "share"), [(True, 0.05), (False, 0.6)], ids=["killed", "disk full"])
def test_a_run_disturbed_at_an_operation_goes_on_to_the_same_result(tmp_path, undisturbed, kill, share):
    expected, operations = undisturbed
    disturbed(tmp_path / "run", 1 + round(share * (operations - 1)), kill, expected)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kill", [True, False], ids=["killed", "disk full"])
def test_a_run_disturbed_at_any_operation_goes_on_to_the_same_result(tmp_path, undisturbed, kill, part):
    expected, operations = undisturbed
    for moment in range(1 + part, operations + 1, PARTS):
        disturbed(tmp_path / str(moment), moment, kill, expected)
