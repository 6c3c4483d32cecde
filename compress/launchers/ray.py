"""Jobs on the cores and GPUs of this machine, or on a Ray cluster."""

import os
from collections.abc import Iterator, Sequence
from typing import Annotated

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

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Exception | None]]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # tells its makers nothing
        import ray

        try:
            # "local": never a cluster that happens to run.
            ray.init(self.address or "local", include_dashboard=None, log_to_driver=False, logging_level="error")
        except ConnectionError as failure:
            raise UserError(f"hydra.launcher.address: found {self.address!r} ({failure})".splitlines()[0]) from None
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
