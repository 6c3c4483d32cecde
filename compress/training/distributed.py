"""`trainer=ddp`: the student is trained by several processes, which the job starts, watches and outlives.

The job itself never joins them. It has the teacher ready before they start; they train until the last checkpoint is
written (`compress.pipeline.worker`, with the configuration in the run's directory and nothing of the command line);
then it goes on alone from that checkpoint, as a resumed run does. So there is nobody who would wait while it quantizes,
and what a sweep or a launcher calls is one job in one process.

`data.batch_size` is that of all processes together: each takes its share of the same batch, and gradients are those of
one process, but for BatchNorm, whose statistics are those of a share unless `trainer.sync_batchnorm` is on.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from omegaconf import DictConfig

from compress.errors import MACHINE, UserError
from compress.files import write_json, write_text
from compress.paths import PACKAGE
from compress.progress import console
from compress.training.fit import LAST, epoch_of
from compress.training.processes import FAILURES, node_rank, processes, processes_here

# Why the first of several machines ended, for the others, which may look a little later.
ENDED = "ended.txt"
RECENT = 60.0  # seconds


def train(config: DictConfig, directory: Path, prepare: Callable[[], object], command: Sequence[str]) -> None:
    """Trains the student of `config` in processes of their own, from `last.ckpt` on if there is one.

    `directory` holds config.yaml already. `prepare` is called before they start, and `command` starts each of them.
    Raises what one of the processes fails with, when all have ended.
    """
    _meeting_point(config.trainer)  # whether there is one
    if _is_trained(config, directory):
        return
    prepare()
    console.print(
        f"student {config.student.stem}: training for {config.trainer.max_epochs} epochs "
        f"in {processes(config.trainer)} processes",
        style="bold",
    )
    _start(config.trainer, command)


def join(config: DictConfig, directory: Path, command: Sequence[str]) -> None:
    """The part of a machine that is not the first: waits until that begins to train, and trains along.

    Where the first finds the training done, this is over too. Raises UserError where the first has ended before.
    """
    address, port = _meeting_point(config.trainer)
    begun = time.time()
    while True:
        try:
            socket.create_connection((address, port), timeout=10).close()
            break
        except OSError:
            if (directory / "result.json").exists() or _is_trained(config, directory):
                return
            ended = directory / ENDED
            if ended.exists() and ended.stat().st_mtime > begun - RECENT:
                reason = ended.read_text(encoding="utf-8").strip()
                raise UserError(
                    f"{ended}: the first machine has ended ({reason}); accepted: the same command"
                ) from None
            time.sleep(1)
    _start(config.trainer, command)


@contextmanager
def ends_all(trainer: Mapping[str, Any], directory: Path) -> Iterator[None]:
    """What the first of several machines does: where it fails, the others find in `directory` that it did."""
    if trainer.get("num_nodes", 1) == 1:
        yield
        return
    ended = directory / ENDED
    ended.unlink(missing_ok=True)
    try:
        yield
    except BaseException as failure:
        lines = str(failure).splitlines()
        write_text(ended, f"{type(failure).__name__}: {lines[0] if lines else 'no more is known'}\n")
        raise


def _is_trained(config: DictConfig, directory: Path) -> bool:
    last = directory / "checkpoints" / LAST
    return last.exists() and epoch_of(last) >= config.trainer.max_epochs


def _start(trainer: Mapping[str, Any], command: Sequence[str]) -> None:
    count = processes_here(trainer)
    address, port = _meeting_point(trainer)
    environment = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": str(processes(trainer))}
    environment |= {"GROUP_RANK": str(node_rank(trainer)), "LOCAL_WORLD_SIZE": str(count)}
    # Where the job found this package, whatever lies in the working directory.
    environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    ranks = [
        environment | {"LOCAL_RANK": str(local), "RANK": str(node_rank(trainer) * count + local)}
        for local in range(count)
    ]
    watch(command, ranks)


def _meeting_point(trainer: Mapping[str, Any]) -> tuple[str, int]:
    """Address and port of the first process."""
    if trainer.get("num_nodes", 1) == 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address: tuple[str, int] = free.getsockname()
            return address
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        port = os.environ["MASTER_PORT"]
        if not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UserError(f"MASTER_PORT: found {port!r}; accepted: 1 to {2**16 - 1}")
        return os.environ["MASTER_ADDR"], int(port)
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if nodes is None:
        raise UserError(
            "trainer.num_nodes: found several without MASTER_ADDR and MASTER_PORT; accepted: both, and NODE_RANK, in "
            "the environment, or a SLURM job"
        )
    return SLURMEnvironment.resolve_root_node_address(nodes), 15000 + int(os.environ["SLURM_JOB_ID"]) % 10000


def watch(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
    """Runs `command` once in each of the environments, at once. Where one fails, all end, and what it said is raised.

    They end with this process, too, however that ends: it holds their standard input open, see `end_with_parent`.
    """
    with tempfile.TemporaryDirectory() as failures:
        started: list[subprocess.Popen[bytes]] = []
        try:
            for variables in environments:
                # In a session of their own: Ctrl-C is for the job, which then ends them.
                options: dict[str, Any] = {
                    "env": os.environ | variables | {FAILURES: failures},
                    "start_new_session": True,
                }
                started.append(subprocess.Popen(command, stdin=subprocess.PIPE, **options))
            codes: list[int | None] = [None]
            while None in codes and not any(codes):
                time.sleep(0.05)
                codes = [process.poll() for process in started]
        finally:
            for process in started:
                # Not gently: whatever they write is there whole or not at all, and a process that waits for another
                # would not listen.
                if process.poll() is None:
                    process.kill()
                process.wait()
                if process.stdin is not None:
                    process.stdin.close()
        if any(codes):
            _raise(codes, Path(failures))


def _raise(codes: Sequence[int | None], folder: Path) -> NoReturn:
    """The failure that came first; the others fail because of it."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("[0-9]*.json")]
    reports.sort(key=lambda report: report["time"])
    for report in reports:
        if report["mistake"]:
            raise UserError(report["mistake"])
        if report["refused"]:
            raise OSError(*report["refused"])
    failed = [(rank, code) for rank, code in enumerate(codes) if code]
    for rank, code in failed:
        if code < 0:
            raise RuntimeError(f"process {rank} of the training was killed by {signal.Signals(-code).name}")
    for report in reports:
        raise RuntimeError(f"process {report['rank']} of the training failed:\n{report['traceback']}")
    rank, code = failed[0]
    raise RuntimeError(f"process {rank} of the training ended with exit code {code}")


def note_failure(failure: BaseException) -> None:
    """Says in a process that trains with others what the job is to raise."""
    rank = os.environ["RANK"]
    content = {
        "rank": int(rank),
        "time": time.time(),
        "mistake": str(failure) if isinstance(failure, UserError) else None,
        "refused": _refused(failure),
        "traceback": "".join(traceback.format_exception(failure)),
    }
    write_json(Path(os.environ[FAILURES], f"{rank}.json"), content)


def _refused(failure: BaseException) -> list[Any] | None:
    """The arguments of an OSError by which the machine refused something."""
    if not isinstance(failure, OSError) or failure.errno not in MACHINE:
        return None
    return [failure.errno, failure.strerror, failure.filename and str(failure.filename)]


def end_with_parent() -> None:
    """This process ends when the one that started it does, which holds the other end of its standard input."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
