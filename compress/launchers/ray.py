"""Jobs on the cores and GPUs of this machine, or on a Ray cluster."""

import os
import socket
from collections.abc import Iterator, Sequence
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field

from compress.errors import UserError
from compress.launchers.separate import Call, SeparateLauncher

Share = Annotated[float, Field(ge=0)]


class RayLauncher(SeparateLauncher):
    """As many jobs at a time as have `num_cpus` and `num_gpus` each.

    `address`: null for this machine, auto or HOST:PORT for a cluster that runs and sees the same files.
    """

    library = "ray"

    def __init__(self, address: str | None = None, num_cpus: Share = 1, num_gpus: Share = 0) -> None:
        self.address = address
        self.num_cpus = num_cpus
        self.num_gpus = num_gpus

    def check(self) -> None:
        if self.address is None:
            return
        where = urlsplit(self.address if "://" in self.address else f"//{self.address}")
        try:
            if where.port:  # Ray itself would try for minutes
                socket.create_connection((where.hostname, where.port), timeout=10).close()
            self._connect().shutdown()
        except (ConnectionError, OSError, ValueError) as failure:
            raise UserError(
                f"hydra.launcher.address: found {self.address!r} ({str(failure).splitlines()[0]}); accepted: null, "
                "auto or HOST:PORT of a Ray cluster that runs"
            ) from None

    def _connect(self) -> Any:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # tells its makers nothing
        import ray

        # "local": never a cluster that happens to run.
        ray.init(self.address or "local", include_dashboard=None, log_to_driver=False, logging_level="error")
        return ray

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Exception | None]]:
        ray = self._connect()
        try:
            # A process per job, whatever it leaves behind goes with it.
            task = ray.remote(num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_calls=1, max_retries=0)(_call)
            running = {task.remote(call): call for call in calls}
            while running:
                for handle in ray.wait(list(running), num_returns=1)[0]:
                    failure = None
                    try:
                        ray.get(handle)
                    except ray.exceptions.RayError as died:
                        failure = died
                    yield running.pop(handle), failure
        finally:
            ray.shutdown()


def _call(call: Call) -> None:
    call()
