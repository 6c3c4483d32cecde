"""Training in several processes: what it computes, who writes, and how it ends when one of them does."""

import csv
import itertools
import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
from bombs import BOMBS
from processes import PROCESSES
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from waiting import wait_for

import compress
from compress.cli import main
from compress.data.dataset import Share, evaluation_batches
from compress.data.shared import DataSets
from compress.errors import UserError
from compress.paths import PACKAGE
from compress.pipeline.check import checked_jobs
from compress.pipeline.execute import execute
from compress.quantization.lsq import InputStep
from compress.stopping import StoppedError, stoppable
from compress.training import distributed
from compress.training.distributed import watch

SCRIPT = Path(__file__).parents[2] / "scripts" / "run.py"
# A transformer, which has no BatchNorm, in float64: what is left between one process and two is rounding.
RUN = [
    "method=supervised",
    "student=timm",
    "student.name=test_vit",
    "student.input_size=32",
    "trainer.precision=64-true",
    "trainer.max_epochs=3",
    "optimizer=sgd",
    "optimizer.lr=0.05",
    "data.limit=100",
    "data.batch_size=28",
    "data.crop_padding=1",
    "quantizer=none",
]


def metrics(directory):
    with (directory / "metrics.csv").open() as stream:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(stream)]


def weights(directory):
    return torch.load(directory / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The directory of two jobs of two processes each, and what they said."""
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(sys, "argv", [str(SCRIPT)])
        assert main(["-m", "seed=0,1", "trainer=ddp_cpu", *RUN, "hydra.sweep.dir=sweep"]) == 0
    return folder / "sweep"


@pytest.mark.slow
def test_two_processes_compute_what_one_does_and_each_job_of_a_sweep_is_done_once(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = compress.run(RUN)
    assert sorted(path.parent.name for path in sweep.glob("*/result.json")) == ["0", "1"]
    records = [json.loads((sweep / name / "result.json").read_text()) for name in "01"]
    assert [record["seed"] for record in records] == [0, 1]
    assert all(record["student"]["epochs"] == 3 for record in records)
    # Gradients are equal: so is what three epochs make of them.
    alone, together, other = weights(result.directory), weights(sweep / "0"), weights(sweep / "1")
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)
    assert not torch.equal(other["model.network.head.weight"], alone["model.network.head.weight"])
    for row, expected in zip(metrics(sweep / "0"), metrics(result.directory), strict=True):
        del row["crc32"], expected["crc32"]
        assert row == pytest.approx(expected, rel=1e-6)
    # 15 validation images for two processes: none is left out or counted twice.
    for row, expected in zip(records[0]["tradeoff"], result.rows, strict=True):
        for name in ("validation_accuracy", "test_accuracy", "agreement", "bytes"):
            assert row[name] == getattr(expected, name)


@pytest.mark.parametrize(
    ("count", "size", "world_size"), itertools.product((2, 15, 16, 101, 1001), (1, 8, 500), (2, 3))
)
def test_processes_share_the_images_that_are_evaluated(count, size, world_size):
    if count < world_size:
        with pytest.raises(ValueError, match="cannot be shared"):
            evaluation_batches(count, size, 0, world_size)
        return
    shares = [evaluation_batches(count, size, rank, world_size) for rank in range(world_size)]
    assert sorted(index for share in shares for batch in share for index in batch) == list(range(count))
    assert len({len(share) for share in shares}) == 1
    assert all(batch for share in shares for batch in share)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_each_batch(world_size):
    order = list(range(20))[::-1]
    shares = [Share(rank, world_size, 6).of(order) for rank in range(world_size)]
    if world_size == 1:
        assert shares == [order]
        return
    own = 6 // world_size
    for batch in range(3):
        parts = [share[batch * own : (batch + 1) * own] for share in shares]
        assert [index for part in parts for index in part] == order[6 * batch : 6 * batch + 6]
    assert {len(share) for share in shares} == {3 * own}


# A failed process says why in a file, as the workers do; the first of these does so once the second, which waits for
# ever, has begun.
FAILS = """
import json, os, pathlib, signal, sys, time
begun = pathlib.Path("begun")
if os.environ["RANK"] == "1":
    begun.with_suffix(".new").write_text(str(os.getpid()))
    begun.with_suffix(".new").rename(begun)
    time.sleep(3600)
while not begun.exists():
    time.sleep(0.01)
{}
"""
SLEEPS = "import pathlib, time; pathlib.Path('begun').touch(); time.sleep(3600)"
SAYS = "pathlib.Path(os.environ['COMPRESS_FAILURES'], '0.json').write_text(json.dumps({})); sys.exit(1)"
REPORT = {"rank": 0, "time": 1, "mistake": None, "refused": None, "traceback": ""}
FAILURES = {
    "sys.exit(3)": (RuntimeError, "process 0 of the training ended with exit code 3"),
    "os.kill(os.getpid(), signal.SIGKILL)": (RuntimeError, "process 0 of the training was killed by SIGKILL"),
    SAYS.format(REPORT | {"mistake": "lr: too large"}): (UserError, "^lr: too large$"),
    SAYS.format(REPORT | {"refused": [28, "No space left", "a.ckpt"]}): (OSError, "No space left: 'a.ckpt'"),
    SAYS.format(REPORT | {"traceback": "ValueError: odd"}): (RuntimeError, "0 .*\n.*odd"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_where_one_process_fails_all_end_and_the_job_says_why(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failure, said = FAILURES[how]
    with pytest.raises(failure, match=said):
        watch([sys.executable, "-c", FAILS.format(how)], [{"RANK": "0"}, {"RANK": "1"}])
    assert not is_alive(int(Path("begun").read_text()))


def watch_sleepers(folder):
    os.chdir(folder)
    try:
        with stoppable():
            watch([sys.executable, "-c", SLEEPS], [{"RANK": "0"}])
    except StoppedError as stopped:
        sys.exit(stopped.exit_code)


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_configuration_that_became_a_bomb_is_one_line(bomb, tmp_path):
    (tmp_path / "config.yaml").write_text(BOMBS[bomb])
    command = [sys.executable, "-m", "compress.pipeline.worker", str(tmp_path)]
    with pytest.raises(UserError, match=r"config\.yaml.*: found what cannot be read as YAML"):
        watch(command, [{"RANK": "0", "PYTHONPATH": str(PACKAGE.parent)}])


@pytest.mark.slow
def test_a_stopped_job_ends_its_processes(tmp_path):
    job = PROCESSES.Process(target=watch_sleepers, args=(tmp_path,))
    job.start()
    wait_for((tmp_path / "begun").exists, lambda: job.exitcode)
    [sleeper] = workers_of(job).values()
    os.kill(job.pid, signal.SIGTERM)
    job.join()
    assert job.exitcode == 143
    assert not is_alive(sleeper)


def start_step(rank, folder, images):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    step = InputStep(4).train()
    step(images[rank::2])
    torch.save(step.state_dict(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_step_of_inputs_starts_from_the_batch_of_all_processes(tmp_path):
    # One process sees negative values, the other none.
    images = torch.rand(6, 3, 4, 4) - torch.tensor([0.5, 0]).repeat(3).view(6, 1, 1, 1)
    jobs = [PROCESSES.Process(target=start_step, args=(rank, tmp_path, images)) for rank in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    alone = InputStep(4).train()
    alone(images)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), dict(alone.state_dict()))


def work(arguments, folder, environment=None):
    """In a process: the command line in `folder`, which gets a file `connecting` when a connection is tried."""
    os.chdir(folder)
    sys.addaudithook(lambda event, _: event == "socket.connect" and Path("connecting").touch())
    os.environ.update(environment or {})
    os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    sys.argv = [str(SCRIPT), *arguments]
    sys.exit(main(arguments))


def a_meeting_point():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def workers_of(process):
    """The processes that train for it, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"\nPPid:\t{process.pid}\n" in (path / "status").read_text():
                environment = dict(
                    line.partition("=")[::2] for line in (path / "environ").read_text().split("\0") if line
                )
                found[environment["RANK"]] = int(path.name)
        except (OSError, KeyError):
            continue
    return found


def is_alive(number):
    try:
        return "State:\tZ" not in Path(f"/proc/{number}/status").read_text()
    except OSError:
        return False


@pytest.mark.slow
def test_a_training_that_lost_a_process_and_then_the_job_goes_on_to_the_same_result(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    last = tmp_path / "run/checkpoints/last.ckpt"

    job = PROCESSES.Process(target=work, args=(["trainer=ddp_cpu", *RUN, "hydra.run.dir=run"], tmp_path))
    job.start()
    wait_for(last.exists, lambda: job.exitcode)
    workers = workers_of(job)
    assert set(workers) == {"0", "1"}
    os.kill(workers["1"], signal.SIGKILL)
    job.join()
    assert job.exitcode == 1
    assert "process 1 of the training was killed by SIGKILL" in (tmp_path / "stderr").read_text()
    assert not any(map(is_alive, workers.values()))
    assert not (tmp_path / "run/result.json").exists()

    job = PROCESSES.Process(target=work, args=(["resume=run"], tmp_path))
    job.start()
    wait_for(lambda: len(workers_of(job)) == 2, lambda: job.exitcode)
    workers = workers_of(job)
    job.kill()
    job.join()
    wait_for(lambda: not any(map(is_alive, workers.values())))

    # What is left is done as if by two machines.
    meeting = a_meeting_point()
    arguments = ["resume=run", "trainer.devices=1", "trainer.num_nodes=2"]
    (tmp_path / "connecting").unlink(missing_ok=True)
    job = PROCESSES.Process(target=work, args=(arguments, tmp_path, meeting | {"NODE_RANK": "1"}))
    job.start()
    # The second comes first.
    wait_for((tmp_path / "connecting").exists, lambda: job.exitcode)
    for key, value in meeting.items():
        monkeypatch.setenv(key, value)
    assert main(arguments) == 0
    job.join()
    assert job.exitcode == 0
    assert metrics(tmp_path / "run") == metrics(sweep / "0")
    torch.testing.assert_close(weights(tmp_path / "run"), weights(sweep / "0"), rtol=0, atol=0)


# The test above ends with two machines that go on; these start from nothing.
@pytest.mark.soak
def test_two_machines_may_come_in_any_order(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    meeting = a_meeting_point()
    arguments = ["trainer=ddp_cpu", "trainer.devices=1", "trainer.num_nodes=2", *RUN, "hydra.run.dir=run"]
    second = PROCESSES.Process(target=work, args=(arguments, tmp_path, meeting | {"NODE_RANK": "1"}))
    second.start()
    wait_for((tmp_path / "connecting").exists, lambda: second.exitcode)
    for key, value in meeting.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    assert main(arguments) == 0
    second.join()
    assert second.exitcode == 0
    assert metrics(tmp_path / "run") == metrics(sweep / "0")


@pytest.mark.slow
def test_the_second_machine_does_not_wait_for_a_first_that_is_done_or_gone(sweep, tmp_path, monkeypatch):
    for key, value in a_meeting_point().items():
        monkeypatch.setenv(key, value)
    config = checked_jobs(["trainer=ddp_cpu", "trainer.devices=1", "trainer.num_nodes=2", *RUN])[0].config
    distributed.join(config, sweep / "0", [])
    trained = tmp_path / "trained/checkpoints/last.ckpt"
    trained.parent.mkdir(parents=True)
    trained.write_bytes((sweep / "0/checkpoints/last.ckpt").read_bytes())
    distributed.join(config, tmp_path / "trained", [])
    trained.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"last\.ckpt, which is damaged; accepted: to remove"):
        distributed.train(config, tmp_path / "trained", lambda: None, [])
    gone = tmp_path / "gone"
    gone.mkdir()
    with pytest.raises(ZeroDivisionError), distributed.ends_all(config.trainer, gone):
        raise ZeroDivisionError("of all things")
    with pytest.raises(UserError, match=r"the first machine has ended .ZeroDivisionError: of all things.; accepted"):
        distributed.join(config, gone, [])
    with distributed.ends_all(config.trainer, gone):
        assert list(gone.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("MASTER_PORT", "abc", "MASTER_PORT: found 'abc'; accepted: 1 to 65535"),
        ("NODE_RANK", "2", "NODE_RANK: found '2'; accepted: 0 to 1, below trainer.num_nodes"),
        ("NODE_RANK", "x", "NODE_RANK: found 'x'"),
    ],
)
def test_what_machines_are_told_is_checked(key, value, said, monkeypatch, tmp_path):
    for name, each in (a_meeting_point() | {key: value}).items():
        monkeypatch.setenv(name, each)
    [job] = checked_jobs(["trainer=ddp_cpu", "trainer.devices=1", "trainer.num_nodes=2", *RUN])
    with pytest.raises(UserError, match=said):
        execute(job, tmp_path, DataSets())


@pytest.mark.slow
def test_one_process_writes_whatever_number_it_was_started_under(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    result = compress.run([*RUN, "trainer.max_epochs=1"])
    assert metrics(result.directory)
