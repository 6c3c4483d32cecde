"""Each job as a SLURM job, or as a process of this machine in the same way."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

from pydantic import Field

from compress.arguments import Count, Positive
from compress.errors import UserError, first_line
from compress.sweeps.launchers.separate import Call, SeparateLauncher

SECONDS_BETWEEN_LOOKS = 0.5
PASSED_ON = ("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "nodes", "mem_gb")


@dataclass(frozen=True)
class SubmititLauncher(SeparateLauncher):
    """Keys are those of submitit; `slurm` holds further ones of sbatch as submitit names them."""

    library = "submitit"

    cluster: Literal["local", "slurm"]
    submitit_folder: str
    array_parallelism: Count
    timeout_min: Count
    cpus_per_task: Count
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    tasks_per_node: Count = 1
    nodes: Count = 1
    mem_gb: Positive | None = None
    max_num_timeout: Annotated[int, Field(ge=0)] = 0
    setup: list[str] | None = None
    slurm: dict[str, Any] | None = None

    def parameters(self) -> dict[str, Any]:
        """What submitit's executor is told."""
        parameters = {key: getattr(self, key) for key in PASSED_ON}
        parameters |= {"name": "compress", f"{self.cluster}_setup": self.setup}
        parameters |= {f"slurm_{key}": value for key, value in (self.slurm or {}).items()}
        if self.cluster == "slurm":
            parameters["slurm_array_parallelism"] = self.array_parallelism
        return {key: value for key, value in parameters.items() if value is not None}

    def check(self) -> None:
        if self.cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
            raise UserError(
                "hydra/launcher: found submitit_slurm, but there is no sbatch here; accepted: a machine of the "
                "cluster, or submitit_local, joblib, ray"
            )
        try:
            with TemporaryDirectory() as folder:
                self._executor(Path(folder))
        except (NameError, TypeError, ValueError) as mistake:
            raise UserError(f"hydra.launcher: {first_line(mistake)}") from None

    def _executor(self, folder: Path) -> Any:
        import submitit

        executor = submitit.AutoExecutor(
            folder, self.cluster, **{f"{self.cluster}_max_num_timeout": self.max_num_timeout}
        )
        executor.update_parameters(**self.parameters())
        return executor

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Exception | None]]:
        executor = self._executor(Path(self.submitit_folder).absolute())
        # A cluster queues; this machine has to be spared.
        at_once = len(calls) if self.cluster == "slurm" else self.array_parallelism
        waiting = list(calls)
        running: dict[Any, Call] = {}
        # Both hand their environment on.
        os.environ.setdefault("OMP_NUM_THREADS", str(self.cpus_per_task))
        try:
            while waiting or running:
                batch = waiting[: at_once - len(running)]
                if batch:
                    del waiting[: len(batch)]
                    running |= zip(executor.map_array(Resubmitted(), batch), batch, strict=True)
                for job in [job for job in running if job.done()]:
                    yield running.pop(job), job.exception()
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            # Those on a cluster go on without the process that waits for them, those here would too.
            for job in running if self.cluster == "local" else ():
                job.cancel()


class Resubmitted:
    """Runs a call; submitit puts it into the queue again, to be continued, when its time is up or others go first."""

    def __call__(self, call: Call) -> None:
        call()

    def checkpoint(self, call: Call) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, call)
