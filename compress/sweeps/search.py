"""A search for accuracy and few bytes, or few milliseconds, by Optuna: `scripts/search.py`.

A search is a directory: `search.json` says what is searched, `journal.log` is Optuna's journal, `trials/N` the run of
trial N, and `pareto.csv` and `pareto.png` show what was found. Several processes may work on it, each trial under a
file lock that dies with its process: a trial that is running without one was killed, and another goes on in its
directory. Optuna maximises the validation accuracy and minimises the cost of `compress.sweeps.pareto.chosen`.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock, Timeout

from compress.data.shared import DataSets
from compress.errors import UserError, first_line, in_one_line
from compress.files import make_chosen, read_json, write_json
from compress.pipeline.check import checked_jobs
from compress.pipeline.execute import execute
from compress.progress import console
from compress.report.finished import flattened
from compress.stopping import StoppedError, raise_if_stopped, stoppable
from compress.sweeps.pareto import COSTS, Point, chosen, pareto_set, read_points, write_pareto
from compress.sweeps.space import Space, Values, check_space

SAMPLERS = {"tpe": "TPESampler", "nsga2": "NSGAIISampler"}
# A trial that ends its process every time, by its memory perhaps, must not do so for ever.
TRIES = 5
GRACE = 10  # seconds for a process to end what it has open elsewhere


def search(space: Space, directory: Path, trials: int, processes: int = 1) -> "Outcome":
    """Goes on with the search in `directory`, or begins it, until it has `trials` trials; returns what there is then.

    Raises UserError, before any work, for what cannot be searched and for a directory that belongs to something else.
    """
    _optuna()
    for name, number in (("trials", trials), ("processes", processes)):
        if number < 1:
            raise UserError(f"{name}: found {number}; accepted: a whole number of at least 1")
    if space.minimize == "latency" and processes > 1:
        raise UserError(f"processes: found {processes}, which would slow each other down; accepted for a latency: 1")
    _open(space, directory)
    if processes == 1:
        _work(space, directory, trials)
    else:
        _work_beside(space, directory, trials, processes)
    return _outcome(_Search(space, directory))


@dataclass(frozen=True)
class Outcome:
    """What a search came to: the Pareto set, trials that finished, and why others did not.

    `refused` were mistakes of their combination, `broken` of the program; both have a line by number. `unfinished` are
    at work in other processes, or theirs was killed.
    """

    pareto: tuple[Point, ...]
    finished: int
    refused: Mapping[int, str]
    broken: Mapping[int, str]
    unfinished: int


def _optuna() -> ModuleType:
    try:
        optuna = import_module("optuna")
    except ImportError:
        raise UserError("search: Optuna is not installed; pip install 'compress[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _sampler(space: Space, draws: int) -> Any:
    """The sampler for the trial after `draws` others: what it draws follows from the seed and their number."""
    target = getattr(_optuna().samplers, SAMPLERS[space.sampler])
    return target(**space.sampler_options, seed=(space.seed + 1_000_003 * draws) % 2**32)


def _open(space: Space, directory: Path) -> None:
    """Makes the directory of a checked search, or sees that it is there already."""
    path = directory / "search.json"
    if not path.exists():
        # A process that is beginning this search just now leaves its lock and unfinished files.
        if directory.is_dir() and any(
            file.name != "search.lock" and file.name[0] != "." for file in directory.iterdir()
        ):
            raise UserError(f"output: found {directory}, which holds something else; accepted: a new directory")
        check_space(space)
        make_chosen(directory, "output")
        # Another process may have begun the same search meanwhile.
        with FileLock(directory / "search.lock"):
            if not path.exists():
                write_json(path, space.content())
    known = flattened(read_json(path, "a new directory"))
    content = flattened(space.content())
    for key in [*content, *known]:
        if key not in known or key not in content or known[key] != content[key]:
            raise UserError(
                f"{key}: found {content.get(key, 'none')!r}, but {known.get(key, 'none')!r} in {path}; accepted: the "
                "same search, or a new directory"
            )


class _JournalLock:
    """Optuna's journal under a lock that dies with its process, and without a line whose writer died."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = FileLock(path.with_suffix(".lock"))

    def acquire(self) -> bool:
        self.lock.acquire()
        with self.path.open("rb+") as stream:
            content = stream.read()
            if content and not content.endswith(b"\n"):
                stream.truncate(content.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.lock.release()


@contextmanager
def _reading(journal: Path) -> Iterator[None]:
    """Within it, whatever a damaged `journal` makes Optuna fail with is a UserError that names it."""
    try:
        yield
    except Exception as failure:  # Optuna believes what a journal says, and can fail anywhere in it
        if in_one_line(failure) is not None:
            raise
        accepted = "a journal as Optuna wrote it, or a new directory"
        raise UserError(f"{journal}: cannot be read ({first_line(failure)}); accepted: {accepted}") from failure


class _Search:
    """A process's view of the search in `directory`."""

    def __init__(self, space: Space, directory: Path) -> None:
        optuna = _optuna()
        self.space = space
        self.directory = directory
        self.lock = FileLock(directory / "search.lock")
        self.states = optuna.trial.TrialState
        path = directory / "journal.log"
        # Optuna makes the file where there is none, but not while another process may.
        with self.lock, _reading(path):
            backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=_JournalLock(path))
            self.study = optuna.create_study(
                study_name="search",
                storage=optuna.storages.JournalStorage(backend),
                directions=["maximize", "minimize"],
                load_if_exists=True,
            )
            for trial in self.study.get_trials(deepcopy=False):
                if not isinstance(trial.user_attrs.get("run", 0), int):
                    raise ValueError(f"trial {trial.number} names no number of a run")

    def trials(self) -> list[Any]:
        """Those that count: not the ones that were killed and have a successor."""
        trials_so_far = self.study.get_trials(deepcopy=False)
        replaced = {trial.user_attrs.get("continues") for trial in trials_so_far}
        return [trial for trial in trials_so_far if trial.number not in replaced]

    def run_directory(self, trial: Any) -> Path:
        return self.directory / "trials" / str(trial.user_attrs["run"])

    def trial_lock(self, number: int) -> FileLock:
        return FileLock(self.directory / "locks" / f"{number}.lock")

    def next(self, limit: int, locks: ExitStack) -> tuple[Any, dict[str, str]] | None:
        """The next trial and its values, locked within `locks`; None when there are `limit` of them."""
        with self.lock:
            self._requeue()
            counted = self.trials()
            waiting = [trial for trial in counted if trial.state == self.states.WAITING]
            if not waiting and len(counted) >= limit:
                return None
            taken = {trial.user_attrs.get("run") for trial in counted}
            run = next(number for number in count() if number not in taken)
            self.study.sampler = _sampler(self.space, run)
            trial = self.study.ask()
            locks.enter_context(self.trial_lock(trial.number))
            if "run" not in trial.user_attrs:
                trial.set_user_attr("run", run)
            return trial, self._suggest(trial)

    def _requeue(self) -> None:
        """Lets a new trial go on where the process of another was killed."""
        (self.directory / "locks").mkdir(exist_ok=True)
        for trial in self.study.get_trials(deepcopy=False, states=(self.states.RUNNING,)):
            with suppress(Timeout), self.trial_lock(trial.number).acquire(blocking=False):
                self._requeue_killed(trial.number)

    def _requeue_killed(self, number: int) -> None:
        trials_so_far = self.study.get_trials(deepcopy=False)
        killed = trials_so_far[number]
        if killed.state != self.states.RUNNING:
            return  # it finished before its lock was looked at
        tries = killed.user_attrs.get("tries", 1)
        if tries < TRIES and not any(trial.user_attrs.get("continues") == number for trial in trials_so_far):
            about = killed.user_attrs | {"continues": number, "tries": tries + 1}
            self.study.enqueue_trial(killed.params, user_attrs=about)
        # Last: were it the other way round, a process killed between the two would lose the trial.
        self.study.tell(number, state=self.states.FAIL)

    def _suggest(self, trial: Any) -> dict[str, str]:
        values: dict[str, str] = {}
        for key, dimension in self.space.dimensions.items():
            if not self.space.applies(key, values):
                continue
            if isinstance(dimension, Values):
                values[key] = trial.suggest_categorical(key, dimension.choices)
            else:
                suggest = trial.suggest_int if dimension.integer else trial.suggest_float
                values[key] = repr(suggest(key, dimension.low, dimension.high, log=dimension.log))
        return values

    def show(self) -> list[Point]:
        """Writes and returns the Pareto set of what is finished."""
        with self.lock:
            finished = [trial for trial in self.trials() if trial.state == self.states.COMPLETE]
            points = read_points({trial.user_attrs["run"]: self.run_directory(trial) for trial in finished})
            cost = COSTS[self.space.minimize]
            if points:
                write_pareto(self.directory, points, cost, f"{self.directory.name}: {len(finished)} trials")
            return pareto_set(points, cost)


def _work(space: Space, directory: Path, limit: int) -> None:
    """Runs one trial after the other until there are `limit`."""
    view = _Search(space, directory)
    data_sets = DataSets()
    while True:
        with ExitStack() as locks:
            following = view.next(limit, locks)
            if following is None:
                return
            trial, values = following
            overrides = space.overrides_of(values)
            run_directory = view.run_directory(trial)
            words = " ".join(f"{key}={value}" for key, value in values.items())
            console.print(f"trial {run_directory.name}: {words}", style="bold", markup=False)
            try:
                [job] = checked_jobs(overrides, data_sets=data_sets)
                run_directory.mkdir(parents=True, exist_ok=True)
                result = execute(job, run_directory, data_sets)
                assert result is not None  # `check_space` has refused several machines
                cost = COSTS[space.minimize]
                row = chosen(result.rows, cost)
            except UserError as mistake:
                raise_if_stopped()
                console.print(f"trial {run_directory.name}: {mistake}", markup=False)
                trial.set_user_attr("reason", str(mistake))
                # Not failed: samplers learn from pruned trials that there is nothing good here.
                view.study.tell(trial, state=view.states.PRUNED)
            except Exception as failure:
                raise_if_stopped()
                # One combination may run out of memory, say; the others are not to blame.
                traceback.print_exc()
                trial.set_user_attr("reason", f"{type(failure).__name__}: {first_line(failure)}")
                view.study.tell(trial, state=view.states.FAIL)
            else:
                view.study.tell(trial, [row.validation_accuracy, cost.of(row)])
        view.show()


def _work_beside(space: Space, directory: Path, limit: int, processes: int) -> None:
    """The same in several processes, which share the cores."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(space, directory, limit)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    finally:  # an interrupt, perhaps, of which they know nothing
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(GRACE)
            worker.kill()
            worker.join()
    ended = sum(1 for worker in workers if worker.exitcode)
    if ended:
        console.print(f"{ended} of {processes} processes were ended from outside", style="bold")


def _worker(space: Space, directory: Path, limit: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with stoppable():
            # Ctrl-C reaches all processes of a terminal; theirs is ended by the one that started them.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            _work(space, directory, limit)
    except StoppedError as stopped:
        os._exit(stopped.exit_code)


def _end_with_parent() -> None:
    """Whoever kills a search means all of it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _outcome(view: _Search) -> Outcome:
    front = view.show()
    trials, states = view.trials(), view.states

    def reasons(state: Any) -> dict[int, str]:
        killed = f"its process was killed {TRIES} times"
        return {t.user_attrs["run"]: t.user_attrs.get("reason", killed) for t in trials if t.state == state}

    return Outcome(
        pareto=tuple(front),
        finished=sum(1 for trial in trials if trial.state == states.COMPLETE),
        refused=reasons(states.PRUNED),
        broken=reasons(states.FAIL),
        unfinished=sum(1 for trial in trials if not trial.state.is_finished()),
    )
