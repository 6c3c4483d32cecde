"""A changed bit anywhere in a run: it is refused in a line, or the result is what it would have been."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from faults import stopped_in_the_second_epoch

import compress
from compress.checksums import json_with_checksum
from compress.cli import main
from compress.errors import UserError
from compress.export.weights import load_weights
from compress.models import build
from compress.pipeline.resume import STARTED, started
from compress.training.fit import read_checkpoint

STUDENT = ["student=resnet8", "data.limit=100", "data.batch_size=32", "quantizer.calibration_images=32"]
RUN = [
    *STUDENT,
    "method=kd",
    "teacher=resnet8",
    "teacher.training.epochs=1",
    "quantizer.bits=[4]",
    "trainer.max_epochs=2",
]
DIRECTORY = Path("outputs/runs/one")


def flip(path, draw):
    content = bytearray(path.read_bytes())
    place = draw.randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    return place


def state(path):
    """What a checkpoint holds that the result depends on."""
    content = read_checkpoint(path)
    return {key: content[key] for key in ("epoch", "state_dict", "optimizer_states", "lr_schedulers", "callbacks")}


def same(found, expected):
    if isinstance(expected, torch.Tensor):
        return found.numpy().tobytes() == expected.numpy().tobytes()
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


def outcome(directory):
    record = json.loads((directory / "result.json").read_text())
    for row in record["tradeoff"]:
        for name in [name for name in row if name.startswith(("latency", "speedup"))]:
            del row[name]
    files = {path.name: path.read_bytes() for path in directory.glob("models/*")}
    return {key: record[key] for key in ("student", "tradeoff", "layers", "overrides", "seed", "data")} | {
        "metrics": (directory / "metrics.csv").read_text(),
        "files": files,
    }


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A folder with a run that was stopped in its second epoch, and what becomes of it when it goes on."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        with stopped_in_the_second_epoch():
            assert main([*RUN, f"hydra.run.dir={DIRECTORY}"]) == 2
        shutil.copytree(folder / "outputs", folder / "begun")
        assert main([f"resume={DIRECTORY}"]) == 0
        expected = outcome(DIRECTORY)
        shutil.rmtree("outputs")
    return folder, expected


def resumed_after_flips(folder, expected, seed, times, capsys, monkeypatch):
    """How many of `times` resumed runs, each with another bit changed, were refused."""
    monkeypatch.chdir(folder)
    draw, refused = random.Random(seed), 0
    for _ in range(times):
        shutil.rmtree("outputs", ignore_errors=True)
        shutil.copytree("begun", "outputs")
        path = draw.choice(sorted(path for path in DIRECTORY.rglob("*") if path.is_file() and path.stat().st_size))
        place = flip(path, draw)
        capsys.readouterr()
        code = main([f"resume={DIRECTORY}"])
        errors = capsys.readouterr().err.splitlines()
        if code == 0:
            assert outcome(DIRECTORY) == expected, (path, place)
        else:
            assert (code, len(errors)) == (2, 1), (path, place)
            refused += 1
    return refused


@pytest.mark.slow
def test_a_run_with_a_changed_bit_is_refused_or_ends_as_it_would_have(interrupted, capsys, monkeypatch):
    assert resumed_after_flips(*interrupted, 0, 8, capsys, monkeypatch) > 3


@pytest.mark.soak
def test_forty_runs_with_a_changed_bit_are_refused_or_end_as_they_would_have(interrupted, capsys, monkeypatch):
    assert resumed_after_flips(*interrupted, 1, 40, capsys, monkeypatch) > 15


@pytest.mark.slow
def test_120_checkpoints_and_60_teachers_with_a_changed_bit_are_refused_or_hold_the_same(interrupted):
    folder, _ = interrupted
    draw = random.Random(2)
    for name in ("best.ckpt", "last.ckpt"):
        path = folder / "begun/runs/one/checkpoints" / name
        content, expected, refused = path.read_bytes(), state(path), 0
        for _ in range(60):
            flip(path, draw)
            try:
                assert same(state(path), expected)
            except UserError:
                refused += 1
            path.write_bytes(content)
        assert refused > 50
    [path] = (folder / "begun/teachers").glob("*.safetensors")
    content, network = path.read_bytes(), build("resnet8", 10)
    load_weights(network, path)
    expected, refused = {name: value.clone() for name, value in network.state_dict().items()}, 0
    for _ in range(60):
        flip(path, draw)
        try:
            load_weights(network, path)
            assert same(network.state_dict(), expected)
        except UserError:
            refused += 1
        path.write_bytes(content)
    assert refused > 55


@pytest.mark.slow
@pytest.mark.parametrize("part", ["state_dict", "optimizer_states", "lr_schedulers", "loops"])
def test_a_checkpoint_whose_content_fits_no_training_is_damaged(interrupted, part, capsys, monkeypatch):
    folder, _ = interrupted
    monkeypatch.chdir(folder)
    shutil.rmtree("outputs", ignore_errors=True)
    shutil.copytree("begun", "outputs")
    path = DIRECTORY / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, part: {"another": torch.ones(2)}}, path)
    assert main([f"resume={DIRECTORY}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: resume: found {path}, which is damaged; accepted: ")


@pytest.mark.parametrize("changed", [{"overrides": [1]}, {"overrides": 1}, {"started": ""}, {"started": None}])
def test_a_start_that_no_run_has_written_is_none(changed, tmp_path):
    content = {"overrides": ["seed=1"], "started": "2026-07-01T09:00:00+02:00"}
    (tmp_path / STARTED).write_text(json.dumps(content))
    assert started(tmp_path) == content
    (tmp_path / STARTED).write_text(json.dumps(content | changed))
    assert started(tmp_path) is None


@pytest.mark.slow
def test_a_copy_of_a_run_goes_on(interrupted, tmp_path, monkeypatch):
    folder, expected = interrupted
    shutil.copytree(folder / "begun/runs/one", tmp_path / "copy")
    shutil.copytree(folder / "begun/teachers", tmp_path / "outputs/teachers")
    monkeypatch.chdir(tmp_path)
    assert main(["resume=copy"]) == 0
    assert outcome(Path("copy")) == expected


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    typed = [*STUDENT, "method=supervised", "quantizer.bits=[4]", "trainer.max_epochs=1"]
    return compress.run([*typed, f"output_directory={folder}"]).directory


@pytest.mark.slow
def test_verify_names_each_file_that_does_not_hold(finished, capsys):
    assert main(["--verify", str(finished)]) == 0
    lines = capsys.readouterr().out.splitlines()
    left = sorted(str(path) for path in finished.rglob("*") if path.is_file() and path.name != "run.log")
    assert sorted(line.split()[1].rstrip(":") for line in lines[:-1]) == left
    assert all(line.startswith("holds ") for line in lines[:-1])
    assert sum("bytes, hashes and accuracy" in line for line in lines) == 2
    for path in sorted(finished.rglob("*")):
        if not path.is_file() or path.name == "run.log":
            continue
        content = path.read_bytes()
        path.write_bytes(content[:100] + b"\x00" + content[101:])
        assert main([f"--verify={finished}"]) == 1, path
        damaged = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged")]
        assert any(str(path) in line for line in damaged), path
        path.write_bytes(content)
    for name in ("layers.png", "metrics.csv"):
        (finished / name).rename(finished / "moved")
        assert main(["--verify", str(finished)]) == 1
        assert f"{finished}/{name}: found no such file" in capsys.readouterr().out
        (finished / "moved").rename(finished / name)


@pytest.mark.slow
def test_verify_names_an_accuracy_and_an_origin_that_the_model_does_not_have(finished, capsys):
    path = finished / "result.json"
    content = path.read_text()
    record = json.loads(content)
    del record["sha256"]
    record["tradeoff"][1]["test_accuracy"] = 0.99
    record["versions"]["commit"] = "0" * 40
    path.write_text(json_with_checksum(record))
    assert main(["--verify", str(finished)]) == 1
    said = capsys.readouterr().out
    path.write_text(content)
    damaged = [line for line in said.splitlines() if line.startswith("damaged")]
    assert len(damaged) == 2
    assert all(f"where the run has {'0' * 40}" in line for line in damaged)
    assert "on test images where the run has 99.00 %" in damaged[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--verify"], "error: command line: argument --verify: expected one argument"),
        (
            ["--verify", "nowhere"],
            "error: --verify: found no nowhere/result.json; accepted: the directory of a finished",
        ),
        (["--verify", "nowhere", "seed=1"], "error: --verify: found it beside seed=1; accepted: --verify DIRECTORY"),
    ],
)
def test_a_mistake_beside_verify_is_one_line(typed, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(typed) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(said)
