"""Sweeps: one job ends no other, what is missing is run later, memory stays, and every launcher does the same."""

import csv
import json
import multiprocessing
import os
import shlex
import signal
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from processes import Script
from waiting import LAST_RESORT, wait_for

import compress
from compress.cli import main
from compress.errors import UserError
from compress.files import make_directory
from compress.pipeline.resume import owned
from compress.sweeps import jobs as sweeps
from compress.sweeps.outcomes import outcome

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "run.py"
TINY = [
    "student=resnet8",
    "data.limit=150",
    "trainer.max_epochs=1",
    "trainer.log_every=0",
    "quantizer=none",
]
ALONE = ["method=supervised", *TINY]
DISTILLED = ["-m", "method=kd,dkd", "teacher=resnet8", "teacher.training.epochs=1", *TINY]
# Methods that go wrong: one by an exception, one by what the operating system does to a process without memory.
TROUBLE = """
    import os
    import signal
    import time

    from compress.methods.supervised import Supervised

    class Raising(Supervised):
        def on_train_start(self):
            if "MENDED" not in os.environ:
                raise ZeroDivisionError("a bug of ours")

    class Deaf(Supervised):
        def on_train_start(self):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            except BaseException:
                raise RuntimeError("what native code makes of a signal") from None

    class Sleeping(Supervised):
        def on_train_start(self):
            time.sleep(600)

    class Killed(Supervised):
        def on_train_start(self):
            os.kill(os.getpid(), signal.SIGKILL)
"""
GOOD, RAISING, KILLED = "compress.methods.supervised.Supervised", "trouble.Raising", "trouble.Killed"
DEAF, SLEEPING = "trouble.Deaf", "trouble.Sleeping"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory from which this process and others can import `trouble`; one thread each."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trouble.py").write_text(textwrap.dedent(TROUBLE))
    monkeypatch.syspath_prepend(tmp_path)
    path = os.pathsep.join([str(tmp_path), str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    sys.modules.pop("trouble", None)


def results(directory: Path) -> dict[str, dict]:
    """What has to be equal, of each job."""
    found = {}
    for path in sorted(directory.glob("*/result.json")):
        record = json.loads(path.read_text())
        rows = [{key: value for key, value in row.items() if "latency" not in key} for row in record["tradeoff"]]
        files = [(path.parent / row["file"]).read_bytes() for row in rows]
        found[path.parent.name] = {"student": record["student"], "rows": rows, "files": files}
    return found


def test_a_sweep_under_joblib_gives_what_one_after_the_other_gives_and_shares_no_file(folder, capsys):
    # Both at once, in one folder: the teacher is trained by whoever comes first, all else is apart.
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.launcher.threads=1"]
    joblib = Script(SCRIPT, *DISTILLED, *launcher)
    assert main([*DISTILLED, "trainer.log_every=0"]) == 0
    said = capsys.readouterr().out
    other, problems = joblib.said()
    assert joblib.wait() == 0, problems
    assert "2 of 2" in other
    directories = sorted((folder / "outputs" / "sweeps").iterdir())
    assert len(directories) == 2
    one, two = map(results, directories)
    assert list(one) == ["0", "1"]
    assert one == two
    assert len(list((folder / "outputs" / "teachers").glob("*.safetensors"))) == 1
    for text, directory in ((said, directories[0]), (other, directories[1])):
        if f"/{directory.name}\n" not in text:  # which of them came first is not known
            directory = directories[1 - directories.index(directory)]
        table = text[text.index(f"sweep outputs/sweeps/{directory.name}\n") :]
        assert table.count(" finished ") == 2
        assert table.count("method=dkd") == table.count("method=kd") == 1
        with (directory / "summary.csv").open() as stream:
            lines = list(csv.DictReader(stream))
        assert [line["run"] for line in lines] == ["0", "1"]
        assert {(directory / line["file"]).is_file() for line in lines} == {True}


def test_a_job_that_fails_ends_no_other_and_is_run_again_later(folder, capsys, monkeypatch):
    # 0: fine, 1: a mistake of the user that only shows in training, 2 and 3: a bug.
    sweep = ["-m", f"method._target_={GOOD},{RAISING}", "optimizer.lr=1e-3,1e30", *ALONE]
    assert main([*sweep, "hydra.sweep.dir=swept"]) == 1
    streams = capsys.readouterr()
    assert [outcome(Path("swept", str(number))).state for number in range(4)] == ["finished"] + 3 * ["failed"]
    assert "trouble.py" in (text := Path("swept/2/failed.txt").read_text())
    assert text.startswith("ZeroDivisionError: a bug of ours\n\nTraceback")
    assert "Traceback" in streams.err
    assert Path("swept/1/failed.txt").read_text().startswith("error: student: training diverged in epoch 1")
    assert "Traceback" not in Path("swept/1/failed.txt").read_text()
    for said in ("job 1 failed: error: student: training diverged", "job 2 failed: ZeroDivisionError: a bug of ours"):
        assert said in streams.out
    assert f"sweep=swept 'allow_targets=[{RAISING}]'" in streams.out

    before = {path: path.stat().st_mtime_ns for path in Path("swept/0").rglob("*")}
    monkeypatch.setenv("MENDED", "1")
    assert main(["sweep=swept", "trainer.log_every=1", f"allow_targets=[{RAISING}]"]) == 2
    said = capsys.readouterr().out
    assert [outcome(Path("swept", str(number))).state for number in range(4)] == ["finished", "failed"] * 2
    assert [f"job {number}: " in said for number in range(4)] == [False, True, True, True]
    assert "job 1 failed" in said
    assert "job 2 failed" not in said
    assert "log_every: 1" in Path("swept/2/config.yaml").read_text()
    assert before == {path: path.stat().st_mtime_ns for path in Path("swept/0").rglob("*")}
    with Path("swept/summary.csv").open() as stream:
        assert [line["run"] for line in csv.DictReader(stream)] == ["0", "2"]


def test_a_sweep_killed_in_its_third_job_is_continued_there(folder, capsys):
    options = [*ALONE, "trainer.max_epochs=15"]
    process = Script(SCRIPT, "-m", "seed=0,1,2", *options, "hydra.sweep.dir=swept")
    wait_for(Path("swept/2/checkpoints/last.ckpt").exists, process.poll)
    process.kill()
    process.wait()
    assert sorted(results(Path("swept"))) == ["0", "1"]
    assert main(["sweep=swept"]) == 0
    assert "continuing after epoch" in capsys.readouterr().out
    swept = results(Path("swept"))
    assert sorted(swept) == ["0", "1", "2"]
    undisturbed = compress.run(["seed=2", *options])
    assert swept["2"]["student"] == undisturbed.record.content()["student"]
    assert main(["sweep=swept"]) == 0
    assert "3 of 3 jobs are finished" in capsys.readouterr().out


# Under submitit each job has a process from the start, as the test of SLURM shows: that one's death is the plainest.
@pytest.mark.parametrize("launcher", ["joblib", pytest.param("submitit_local", marks=pytest.mark.soak), "ray"])
def test_a_job_whose_process_is_killed_is_one_that_failed(folder, launcher, capsys):
    sweep = ["-m", f"method._target_={KILLED},{GOOD}", *ALONE, "hydra.sweep.dir=swept", f"hydra/launcher={launcher}"]
    assert main(sweep) == 1
    said = capsys.readouterr().out
    assert [outcome(Path("swept", str(number))).state for number in range(2)] == ["failed", "finished"]
    assert "2 of 2" in said
    assert "job 0 failed: " in said
    assert "process" in Path("swept/0/failed.txt").read_text()
    assert "student resnet8: training" in Path("swept/1/output.txt").read_text()
    assert json.loads(Path("swept/1/result.json").read_text())["hardware"]["threads"] == 1


def test_a_signal_that_is_lost_on_its_way_stops_the_sweep_all_the_same(folder, capsys):
    assert main(["-m", "seed=0,1", f"method._target_={DEAF}", *ALONE, "hydra.sweep.dir=swept"]) == 143
    streams = capsys.readouterr()
    assert streams.err == f"stopped by SIGTERM; to go on: python scripts/run.py sweep=swept 'allow_targets=[{DEAF}]'\n"
    assert "run what is missing" not in streams.out
    assert outcome(Path("swept/0")).state == "not finished"
    assert not Path("swept/1").exists()


# The signal that Ray would take for itself; Ctrl-C takes the same way through our launcher.
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.soak)])
def test_ray_lets_itself_be_stopped(folder, number):
    launcher = ["hydra/launcher=ray", f"hydra.launcher.num_cpus={len(os.sched_getaffinity(0))}"]  # for one at a time
    typed = ["-m", "seed=0,1", f"method._target_={SLEEPING}", *ALONE, "hydra.sweep.dir=swept"]
    process = Script(SCRIPT, *typed, *launcher)
    wait_for(Path("swept/0/output.txt").exists, process.poll)
    process.send_signal(number)
    said = process.said()[1]
    assert process.wait() == 128 + number
    words = shlex.join(["sweep=swept", *launcher, f"allow_targets=[{SLEEPING}]"])
    assert said.splitlines()[-1] == f"stopped by {number.name}; to go on: python scripts/run.py {words}"
    assert "Traceback" not in said


# Stands in for a cluster: `sbatch` starts the tasks of the array one after the other, `srun` runs its command.
SBATCH = """\
#!/usr/bin/env bash
cp "$1" sbatch.txt
( for task in $(seq 0 $(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")); do
    export SLURM_JOB_ID=70$task SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SLURM_JOB_NUM_NODES=1 SLURM_NTASKS=1
    export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_NODELIST=here SLURM_JOB_NAME=compress
    bash "$1"
done ) >slurm.txt 2>&1 &
echo "Submitted batch job 7"
"""
SRUN = """\
#!/usr/bin/env bash
while [[ $1 == --* ]]; do if [[ $1 == *ed ]]; then shift; else shift 2; fi; done
exec "$@"
"""
SACCT = """\
#!/usr/bin/env bash
printf 'JobID|State|NodeList\\n7_0|RUNNING|here\\n7_1|RUNNING|here\\n'
"""


def test_the_script_for_slurm_asks_for_what_was_asked_and_runs_the_jobs(folder, monkeypatch):
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    own = ["hydra/launcher=submitit_slurm", "hydra.launcher.slurm.partition=long", "hydra.launcher.timeout_min=90"]
    own += ["hydra.launcher.setup=['echo ready']", "+hydra.launcher.slurm.mail_user=me@example.org"]
    assert main(["-m", "seed=0,1", *ALONE, *own, "hydra.sweep.dir=swept"]) == 0, Path("slurm.txt").read_text()
    assert sorted(results(Path("swept"))) == ["0", "1"]
    lines = Path("sbatch.txt").read_text().splitlines()
    for option in (
        "array=0-1%2",
        "cpus-per-task=4",
        "gpus-per-node=1",
        "job-name=compress",
        "mail-user=me@example.org",
        "mem=16GB",
        "nodes=1",
        "ntasks-per-node=1",
        "partition=long",
        "signal=USR2@120",
        "time=90",
    ):
        assert f"#SBATCH --{option}" in lines
    assert any(line.startswith(f"#SBATCH --output={folder}/swept/.submitit/%A_%a/") for line in lines)
    assert "echo ready" in lines
    assert any(line.startswith("srun ") and "submitit.core._submit" in line for line in lines)


def watch(folder: Path, jobs: int, *options: str) -> list[float]:
    """Resident megabytes after each of `jobs` in one process."""
    (folder / "memory.py").write_text(
        textwrap.dedent("""
        import os
        from pathlib import Path
        from hydra.experimental.callback import Callback

        class Memory(Callback):
            def on_job_end(self, config, job_return, **others):
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                with open("memory.txt", "a") as stream:
                    print(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, file=stream)
        """)
    )
    seeds = f"seed=range({jobs})"
    process = Script(SCRIPT, "-m", seeds, *ALONE, *options, "+hydra.callbacks.memory._target_=memory.Memory")
    assert process.wait() == 0
    return [float(line) for line in (folder / "memory.txt").read_text().splitlines()]


def test_eight_jobs_in_one_process_take_no_more_memory_than_the_first_few(folder):
    used = watch(folder, 8)
    assert len(used) == 8
    assert used[-1] - used[2] < 30


@pytest.mark.soak
def test_twenty_jobs_of_every_kind_take_no_more_memory_than_the_first_few(folder):
    used = watch(folder, 20, "teacher=resnet8", "teacher.training.epochs=1", "method=dkd", "student=resnet20")
    assert used[-1] - used[4] < 60


def test_directories_that_are_made_at_the_same_moment_are_different(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(2), context.Queue()

    def make() -> None:
        for round_ in range(200):
            barrier.wait()
            queue.put(str(make_directory(tmp_path, f"2026-01-01_00-00-{round_}")))

    processes = [context.Process(target=make) for _ in range(2)]
    for process in processes:
        process.start()
    made = [queue.get(timeout=LAST_RESORT) for _ in range(400)]
    for process in processes:
        process.join()
    assert len(set(made)) == 400


def test_the_latest_sweep_is_the_one_that_was_started_last_of_those_neither_finished_nor_going_on(tmp_path):
    for number, name in enumerate(("old", "finished", "going-on")):
        directory = tmp_path / "sweeps" / name
        directory.mkdir(parents=True)
        (directory / "sweep.yaml").write_text(yaml.safe_dump({"hydra": [], "jobs": [ALONE]}))
        os.utime(directory / "sweep.yaml", (number, number))
    done = tmp_path / "sweeps" / "finished" / "0"
    done.mkdir()
    row = dict.fromkeys(("bits", "activation_bits", "sparsity", "bytes", "ratio", "latency_ms", "latency_32_ms"), 1)
    row |= dict.fromkeys(("validation_accuracy", "test_accuracy", "agreement"), 1.0)
    row |= dict.fromkeys(("levels", "first_last_bits", "runtime_agreement", "logit_difference"))
    row |= {"quantizer": "none", "runtime": "torch", "file": "m.safetensors"}
    record = {"seed": 0, "data": {"name": "Digits"}, "student": {"model": "resnet8"}, "tradeoff": [row]}
    (done / "result.json").write_text(json.dumps(record))
    with FileLock(tmp_path / "sweeps" / "going-on" / ".lock"):
        assert sweeps.latest(tmp_path) == tmp_path / "sweeps/old"
        with pytest.raises(UserError, match="going-on, which another process is running"):
            sweeps.resume(tmp_path / "sweeps" / "going-on")
    assert sweeps.latest(tmp_path) == tmp_path / "sweeps/going-on"


@pytest.mark.parametrize("content", [b"", b"jobs: [1]", b"jobs: []\nhydra: []", b"a: [", bytes(range(256)), b"- 1"])
def test_a_directory_without_a_readable_list_of_jobs_is_refused(content, tmp_path, capsys):
    (tmp_path / "sweep.yaml").write_bytes(content)
    assert main([f"sweep={tmp_path}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: sweep: found {tmp_path}/sweep.yaml, which cannot be read; accepted: ")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


@pytest.mark.parametrize(
    ("typed", "parts"),
    {
        "optimizer.lr=1": ["optimizer.lr=1", "trainer.*"],
        "trainer.max_epochs=a": ["trainer.max_epochs:", "'a'"],
        "hydra/launcher=joblib hydra.launcher.n_jobs=0": ["hydra.launcher.n_jobs:", "0"],
        "hydra/launcher=nosuch": ["hydra/launcher:", "nosuch", "joblib"],
        "-m": ["sweep:", "option"],
    }.items(),
)
def test_a_resumed_sweep_keeps_its_configuration(typed, parts, tmp_path, capsys):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"hydra": [], "jobs": [ALONE]}))
    assert main([f"sweep={tmp_path}", *typed.split()]) == 2
    streams = capsys.readouterr()
    [line] = streams.err.splitlines()
    assert streams.out == ""
    for part in parts:
        assert part in line
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


@pytest.mark.parametrize(
    ("launcher", "extra"),
    [("joblib", "joblib"), ("submitit_local", "submitit"), ("submitit_slurm", "submitit"), ("ray", "ray")],
)
def test_a_launcher_that_is_not_installed_is_named_with_its_extra(launcher, extra, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    import_module("compress.data.digits")  # whose scikit-learn needs joblib, too
    monkeypatch.setitem(sys.modules, extra, None)
    assert main(["-m", *ALONE, f"hydra/launcher={launcher}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: hydra/launcher: found {launcher}, ")
    assert f"pip install 'compress[{extra}]'" in line
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_another_process_is_running_is_left_alone(folder, capsys):
    assert main(["-m", *ALONE, "seed=0,1", "hydra.sweep.dir=swept"]) == 0
    Path("swept/1/result.json").unlink()
    with owned(Path("swept/1")):
        assert main(["sweep=swept"]) == 1
    assert "swept/1: another process is running this job; it is left alone" in capsys.readouterr().err
    assert [outcome(Path("swept", each)).state for each in "01"] == ["finished", "not finished"]
    assert main(["sweep=swept"]) == 0
