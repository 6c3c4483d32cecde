"""Runs that are killed, stopped or requeued, in real processes, and go on to what they would have been undisturbed."""

import csv
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from processes import PROCESSES
from waiting import wait_for

import compress
from compress.cli import main
from compress.errors import UserError
from compress.methods.supervised import Supervised
from compress.pipeline.check import checked_jobs
from compress.pipeline.resume import latest, owned
from compress.results.record import Record
from compress.stopping import StoppedError, stoppable
from compress.training.fit import epoch_of

SCRIPT = Path(__file__).parents[2] / "scripts" / "run.py"
DIRECTORY = Path("outputs/runs/one")
STUDENT = ["student=resnet8", "trainer.max_epochs=3", "data.limit=100", "quantizer.calibration_images=32"]
SUPERVISED = [*STUDENT, "method=supervised", "quantizer.bits=[4]"]
ROUNDED = [*SUPERVISED, "quantizer=rtn"]
# Everything with a state of its own: a teacher, masks, the moving average, dropout, augmentation and mixup.
WHOLE = [
    *STUDENT,
    "method=kd",
    "mixup=images",
    "teacher=resnet8",
    "teacher.training.epochs=2",
    "student.dropout=0.2",
    "data.crop_padding=1",
    "data.batch_size=32",
    "pruning=magnitude",
    "pruning.end_epoch=2",
    "trainer.ema_decay=0.9",
    "quantizer.bits=[2]",
]


def work(arguments, folder, moment=math.inf, said=None, environment=None):
    """In a process of its own: the command line in `folder`, killed at its `moment`-th operation on the files there.

    Those are opening for writing, renaming, removing and making directories; `said` gets how many there were.
    """
    os.chdir(folder)
    os.environ.update(environment or {})
    os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    sys.argv = [str(SCRIPT), *arguments]
    torch.set_num_threads(1)
    count = 0

    def watch(event, about):
        nonlocal count
        writes = event == "open" and isinstance(about[2], int) and about[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in ("os.rename", "os.remove", "os.mkdir")) and "outputs" in str(about[0]):
            count += 1
            if count >= moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    code = main(arguments)
    if said is not None:
        said.send(count)
    sys.exit(code)


def start(arguments, folder, *options, **named):
    process = PROCESSES.Process(target=work, args=(arguments, folder, *options), kwargs=named)
    process.start()
    return process


def outcome(folder):
    """What has to be equal to the last bit; figures of time and of place are left out."""
    directory = folder / DIRECTORY
    record = json.loads((directory / "result.json").read_text())
    for row in record["tradeoff"]:
        for name in [name for name in row if name.startswith(("latency", "speedup"))]:
            del row[name]
    with (directory / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    epochs = [int(row["epoch"]) for row in rows if row["val/accuracy"]]
    assert epochs == list(range(3))
    ends = {}
    for name in ("best.ckpt", "last.ckpt"):
        saved = torch.load(directory / "checkpoints" / name, map_location="cpu", weights_only=True)
        tensors = {**saved["state_dict"]} | {
            f"{parameter}.{key}": value
            for parameter, state in saved["optimizer_states"][0]["state"].items()
            for key, value in state.items()
        }
        ends[name] = saved["epoch"], {key: value.numpy().tobytes() for key, value in tensors.items()}
    files = [*directory.glob("models/*"), *folder.glob("outputs/teachers/*.safetensors")]
    return {
        **{key: record[key] for key in ("student", "tradeoff", "layers", "pruning", "teacher")},
        "metrics": rows,
        "checkpoints": ends,
        "files": {path.name: path.read_bytes() for path in files},
        "left": sorted(path.relative_to(folder).as_posix() for path in folder.glob("outputs/**/*") if path.is_file()),
    } | {"teacher": {key: value for key, value in record["teacher"].items() if key not in ("seconds", "file")}}


def undisturbed(folder):
    """The outcome of a run that nobody stops, its seconds and its operations on files."""
    folder.mkdir()
    receive, send = PROCESSES.Pipe(duplex=False)
    started = time.monotonic()
    process = start([*WHOLE, f"hydra.run.dir={DIRECTORY}"], folder, math.inf, send)
    operations = receive.recv()
    process.join()
    assert process.exitcode == 0
    return outcome(folder), time.monotonic() - started, operations


def killed_and_resumed(folder, expected, draw, share, seconds, operations):
    """Kills a run after about `share` of its work, perhaps its continuation too; returns how often it was."""
    folder.mkdir()
    kills = 0
    while True:
        resumable = (folder / DIRECTORY / "config.yaml").exists()
        arguments = [f"resume={DIRECTORY}"] if resumable else [*WHOLE, f"hydra.run.dir={DIRECTORY}"]
        last = kills > 0 and draw.random() < 0.5
        by_time = draw.random() < 0.5
        process = start(arguments, folder, math.inf if by_time or last else max(1, round(share * operations)))
        process.join(share * seconds if by_time and not last else None)
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        share *= draw.random()
        if not (folder / DIRECTORY / "config.yaml").exists():
            # It had not begun yet: the directory is empty or holds what a run that has not begun leaves.
            for path in folder.glob(f"{DIRECTORY}/*"):
                path.unlink()
    assert outcome(folder) == expected
    return kills


def kill_often(folder, times):
    """Kills runs at moments spread over their whole length until that happened `times` times."""
    expected, seconds, operations = undisturbed(folder / "undisturbed")
    draw = random.Random(times)
    kills = runs = 0
    while kills < times:
        strata = min(times, 5)
        share = (runs % strata + draw.random()) / strata
        kills += killed_and_resumed(folder / str(runs), expected, draw, share, seconds, operations)
        runs += 1


@pytest.mark.slow
def test_runs_killed_at_any_moment_go_on_to_the_same_result_bit_for_bit(tmp_path):
    kill_often(tmp_path, 3)


@pytest.mark.soak
def test_runs_killed_fifty_times_go_on_to_the_same_result_bit_for_bit(tmp_path):
    kill_often(tmp_path, 50)


def stopped(folder, number, when, arguments, **named):
    """The exit code and the standard error of a process that got signal `number` when the file `when` was there."""
    process = start(arguments, folder, **named)
    wait_for(lambda: list(folder.glob(f"outputs/runs/*/{when}")), lambda: process.exitcode)
    os.kill(process.pid, number)
    process.join()
    return process.exitcode, (folder / "stderr").read_text()


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_goes_on_after_its_last_epoch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    many = [*ROUNDED, "trainer.max_epochs=30", f"hydra.run.dir={DIRECTORY}"]
    code, said = stopped(tmp_path, signal.SIGINT, "checkpoints/last.ckpt", many)
    assert (code, said) == (130, f"stopped by SIGINT; to go on: python scripts/run.py resume={tmp_path / DIRECTORY}\n")
    assert not (DIRECTORY / "result.json").exists()
    epoch = epoch_of(DIRECTORY / "checkpoints/last.ckpt")
    assert epoch < 30
    assert main(["resume=latest"]) == 0
    assert f"continuing after epoch {epoch}" in capsys.readouterr().out
    with (DIRECTORY / "metrics.csv").open() as stream:
        assert [row["epoch"] for row in csv.DictReader(stream)] == [*map(str, range(30)), ""]


def test_a_stop_that_native_code_turns_into_its_own_failure_is_a_stop_all_the_same():
    with pytest.raises(StoppedError, match="stopped by SIGTERM"), stoppable():  # noqa: PT012
        try:
            signal.raise_signal(signal.SIGTERM)
        except StoppedError:
            raise UserError("a file: found it truncated") from None


@pytest.mark.slow
def test_a_job_that_slurm_stops_and_requeues_goes_on_in_its_own_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # What makes Lightning believe in SLURM too, which has ways of its own to answer signals.
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "localhost"}
    code, said = stopped(tmp_path, signal.SIGTERM, "models/student-fp32.safetensors", SUPERVISED, environment=slurm)
    [directory] = Path("outputs/runs").iterdir()
    assert (code, said) == (143, f"stopped by SIGTERM; to go on: python scripts/run.py resume={tmp_path / directory}\n")
    for key, value in (slurm | {"SLURM_RESTART_COUNT": "1"}).items():
        monkeypatch.setenv(key, value)
    assert main(SUPERVISED) == 0
    assert "continuing after epoch 3" in capsys.readouterr().out
    assert [*Path("outputs/runs").iterdir()] == [directory]
    assert json.loads((directory / "result.json").read_text())["slurm_job"] == "7"


def test_the_latest_run_is_the_one_that_was_started_last_of_those_neither_finished_nor_going_on(tmp_path):
    with pytest.raises(UserError, match=r"^resume: found no unfinished run in .*/runs .*accepted: resume=DIRECTORY"):
        latest(tmp_path)
    for age, name in enumerate(["runs/going-on", "runs/finished", "sweeps/s/1", "runs/old", "sweeps/s/0"]):
        directory = tmp_path / name
        directory.mkdir(parents=True)
        (directory / "config.yaml").touch()
        (directory / "started.json").touch()
        os.utime(directory / "started.json", (1000 - age, 1000 - age))
    (tmp_path / "runs" / "not-begun").mkdir()
    (tmp_path / "runs" / "finished" / "result.json").touch()
    with owned(tmp_path / "runs" / "going-on"):
        assert latest(tmp_path) == tmp_path / "sweeps/s/1"
    assert latest(tmp_path) == tmp_path / "runs/going-on"


def test_a_run_that_is_going_on_is_not_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = checked_jobs(SUPERVISED)[0].config
    DIRECTORY.mkdir(parents=True)
    (DIRECTORY / "config.yaml").write_text(OmegaConf.to_yaml(config))
    with owned(DIRECTORY):
        assert main([f"resume={DIRECTORY}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: resume: found {DIRECTORY}, where a run is going on")
    assert [path.name for path in DIRECTORY.iterdir()] == ["config.yaml"]


@pytest.mark.slow
def test_what_was_damaged_since_is_named_with_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*ROUNDED, "trainer.max_epochs=1", f"hydra.run.dir={DIRECTORY}"]) == 0
    capsys.readouterr()

    def refused():
        assert main([f"resume={DIRECTORY}"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    whole = (DIRECTORY / "result.json").read_bytes()
    for content in (b"{", b"{}", whole[:-100]):
        (DIRECTORY / "result.json").write_bytes(content)
        assert refused().startswith(f"error: {DIRECTORY}/result.json: cannot be read")
    (DIRECTORY / "result.json").unlink()
    for name in ("last.ckpt", "best.ckpt"):
        path = DIRECTORY / "checkpoints" / name
        content = path.read_bytes()
        path.write_bytes(content[:3000])
        assert refused().startswith(f"error: resume: found {path}, which is damaged; accepted: to remove {path.parent}")
        path.write_bytes(content)
    (DIRECTORY / "started.json").write_text("[")
    assert refused().startswith(f"error: resume: found {DIRECTORY}/started.json, which cannot be read")
    (DIRECTORY / "started.json").unlink()
    assert main([f"resume={DIRECTORY}"]) == 0


@pytest.mark.slow
def test_a_teacher_that_was_damaged_since_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    typed = [*STUDENT, "method=kd", "teacher=resnet8", "teacher.training.epochs=1", "quantizer=rtn"]
    assert main([*typed, "trainer.max_epochs=1"]) == 0
    [kept] = Path("outputs/teachers").glob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-1])
    capsys.readouterr()
    assert main([*typed, "trainer.max_epochs=1"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: teacher: found {kept}, which is damaged or no safetensors file; "
        "accepted: to remove that file, and the teacher is trained again"
    )


def test_only_what_a_killed_process_left_half_written_is_removed(tmp_path):
    ours = [tmp_path / "checkpoints" / ".best-a1_b2c3d.ckpt", tmp_path / ".metrics-abcdefgh.csv"]
    others = [tmp_path / "run.log", tmp_path / ".hidden-name", tmp_path / "wandb" / ".best-a1_b2c3d.ckpt"]
    for path in (*ours, *others):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with owned(tmp_path):
        assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in others)


@pytest.mark.slow
def test_a_training_that_had_diverged_is_not_trained_further(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begin = Supervised.on_train_epoch_start

    def diverge(module):
        begin(module)
        if module.current_epoch == 1:
            next(module.model.parameters()).data.fill_(float("nan"))

    with monkeypatch.context() as patched:
        patched.setattr(Supervised, "on_train_epoch_start", diverge)
        result = compress.run(ROUNDED)
    metrics = (result.directory / "metrics.csv").read_text()
    (result.directory / "result.json").unlink()
    assert main([f"resume={result.directory}"]) == 0
    assert Record.read(result.directory / "result.json").student == result.record.student
    assert (result.directory / "metrics.csv").read_text() == metrics
