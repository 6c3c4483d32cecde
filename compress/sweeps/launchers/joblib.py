"""Several jobs at a time on the cores of this machine."""

import os
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from compress.arguments import Count
from compress.sweeps.launchers.separate import Call, SeparateLauncher


@dataclass(frozen=True)
class JoblibLauncher(SeparateLauncher):
    """`n_jobs` at a time, each on `threads` cores; left out, the cores are shared out evenly.

    With one at a time joblib would start no process at all.
    """

    library = "joblib"

    n_jobs: Annotated[int, Field(ge=2)] = 2
    threads: Count | None = None

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Exception | None]]:
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        waiting = list(calls)
        while waiting:
            try:
                for call, failure in self._ended(waiting):
                    waiting.remove(call)
                    yield call, failure
            except TerminatedWorkerError:
                # Nothing says which process died, and it took the others with it: each once more, alone.
                suspects, waiting = waiting[: self.n_jobs], waiting[self.n_jobs :]
                for call in suspects:
                    try:
                        yield from list(self._ended([call]))
                    except TerminatedWorkerError as died:
                        yield call, died

    def _ended(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Exception | None]]:
        from joblib import Parallel, delayed, parallel_config

        threads = self.threads or max(1, len(os.sched_getaffinity(0)) // self.n_jobs)
        with parallel_config(backend="loky", n_jobs=self.n_jobs, inner_max_num_threads=threads):
            # Dispatched one by one and in order, so that those under way are always the first of what is left.
            parallel = Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch=self.n_jobs)
            yield from parallel(delayed(_called)(call) for call in calls)


def _called(call: Call) -> tuple[Call, Exception | None]:
    try:
        call()
    except Exception:
        # Not itself, which may be of a kind that does not travel, and would end the others.
        return call, RuntimeError(traceback.format_exc())
    return call, None
