"""Jobs on the cores and GPUs of this machine, or on a Ray cluster."""

import logging
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from compress.arguments import NotNegative
from compress.errors import UserError, first_line
from compress.progress import console
from compress.stopping import raise_if_stopped
from compress.sweeps.launchers.separate import Call, SeparateLauncher


@dataclass(frozen=True)
class RayLauncher(SeparateLauncher):
    """As many jobs at a time as have `num_cpus` and `num_gpus` each.

    `address`: null for this machine, auto or HOST:PORT for a cluster that runs and sees the same files.
    """

    library = "ray"

    address: str | None = None
    num_cpus: NotNegative = 1
    num_gpus: NotNegative = 0

    def check(self) -> None:
        for key, asked in (("num_cpus", self.num_cpus), ("num_gpus", self.num_gpus)):
            if asked > 1 and asked != int(asked):
                raise UserError(f"hydra.launcher.{key}: found {asked}; accepted: a whole number, or a share of one")
        if self.address is None:
            import torch

            cpus, gpus = _cores(), torch.cuda.device_count()
            if self.num_cpus > cpus or self.num_gpus > gpus:  # Ray itself would wait for ever
                raise UserError(
                    f"hydra.launcher: found num_cpus={self.num_cpus:g} and num_gpus={self.num_gpus:g} per job; "
                    f"accepted: at most {cpus} and {gpus}, which this machine has"
                )
            return
        where = urlsplit(self.address if "://" in self.address else f"//{self.address}")
        try:
            if where.port:  # Ray itself would try for minutes
                socket.create_connection((where.hostname, where.port), timeout=10).close()
            with self._connected():
                pass
        except (ConnectionError, OSError, ValueError) as failure:
            raise UserError(
                f"hydra.launcher.address: found {self.address!r} ({first_line(failure)}); accepted: null, "
                "auto or HOST:PORT of a Ray cluster that runs"
            ) from None

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        """Ray, with signals meaning what they did before: it takes SIGTERM for itself."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # tells its makers nothing
        import ray

        # "local": never a cluster that happens to run.
        where = {"address": self.address} if self.address else {"address": "local", "num_cpus": _cores()}
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            try:
                ray.init(**where, include_dashboard=None, log_to_driver=False, logging_level=logging.ERROR)
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
            yield ray
        finally:
            ray.shutdown()

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Exception | None]]:
        with self._connected() as ray:
            asked = {"CPU": self.num_cpus, "GPU": self.num_gpus}
            machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            if not any(all(machine.get(key, 0) >= value for key, value in asked.items()) for machine in machines):
                # It may be a cluster that grows.
                console.print("  no machine of the cluster has room for a job yet; waiting for one that has")
            # A process per job, whatever it leaves behind goes with it.
            task = ray.remote(num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_calls=1, max_retries=0)(_call)
            running = {task.remote(call): call for call in calls}
            while running:
                # Ray loses what a signal raises while it waits.
                ended = ray.wait(list(running), num_returns=1, timeout=0.2)[0]
                raise_if_stopped()
                for handle in ended:
                    failure = None
                    try:
                        ray.get(handle)
                    except ray.exceptions.RayError as died:
                        failure = died
                    yield running.pop(handle), failure


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _call(call: Call) -> None:
    call()
