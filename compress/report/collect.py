"""Every run below some directories, as `Run`s and as a CSV of their trade-offs; needs neither PyTorch nor Hydra.

A directory with a `result.json` is a finished run, one with a `config.yaml` alone was interrupted.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from compress.errors import UserError
from compress.files import write_csv
from compress.report.finished import Run, read_run
from compress.results.record import FILE
from compress.results.tradeoff import COLUMNS

# What `write_summary` says of a run, before the columns of the trade-off.
ABOUT = ("run", "data", "experiment", "method", "student", "teacher", "seed", "started", "settings")


@dataclass(frozen=True)
class Collection:
    """The finished runs in order of their names, the directories that are not finished, and a line per problem."""

    runs: tuple[Run, ...]
    unfinished: tuple[Path, ...]
    problems: tuple[str, ...]


def collect(paths: Iterable[Path]) -> Collection:
    """Reads every run in and below `paths`, each once.

    A run that cannot be read is left out and named in `problems`. Raises UserError for a path that is no directory
    and where no finished run is left.
    """
    paths = list(paths)
    for path in paths:
        if not path.is_dir():
            raise UserError(
                f"{path}: found {'a file' if path.exists() else 'no such directory'}; accepted: directories"
            )
    unique = {directory.resolve(): directory for path in paths for directory in run_directories(path)}
    directories = sorted(unique.values(), key=lambda directory: _natural(str(directory)))
    unfinished = tuple(directory for directory in directories if not (directory / FILE).exists())
    parents = [str(directory.parent.absolute()) for directory in directories]
    top = Path(os.path.commonpath(parents)) if parents else Path()
    runs: list[Run] = []
    problems: list[str] = []
    for directory in directories:
        if directory not in unfinished:
            try:
                runs.append(read_run(directory, directory.absolute().relative_to(top).as_posix(), problems))
            except UserError as problem:
                problems.append(f"{problem}; the run is left out")
    if not runs:
        reasons = [f"{len(problems)} that cannot be read ({problems[0]})"] if problems else []
        reasons += [f"{len(unfinished)} not finished"] if unfinished else []
        reason = f": {', '.join(reasons)}" if reasons else ""
        where = ", ".join(map(str, paths))
        raise UserError(f"{where}: found no finished run{reason}; accepted: run directories, or a folder of them")
    return Collection(tuple(runs), unfinished, tuple(problems))


def run_directories(path: Path) -> Iterator[Path]:
    """The directories in and below `path` that hold a run, finished or not; hidden ones are not looked into."""
    for folder, folders, files in os.walk(path):
        if FILE in files or "config.yaml" in files:
            folders.clear()
            yield Path(folder)
        folders[:] = [name for name in folders if not name.startswith(".")]


def _natural(text: str) -> list[tuple[int, str]]:
    """A sort key that puts 2 before 10."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in text.replace("-", "/").split("/")]


def write_summary(path: Path, runs: Sequence[Run]) -> None:
    """Writes a CSV with a line per variant of each run: what the run was, then the columns of `tradeoff.csv`.

    `run` is the run's directory and `file` the model file, relative to the folder of `path`; `settings` is what was
    typed.
    """
    lines = []
    for run in runs:
        directory, record = relative(run.directory, path), run.record
        values = [directory, run.data, run.experiment, run.method, run.student, run.teacher, run.seed, record.started]
        about = dict(zip(ABOUT, [*values, " ".join(record.overrides)], strict=True))
        lines += [about | asdict(row) | {"file": f"{directory}/{row.file}"} for row in run.rows]
    write_csv(path, [*ABOUT, *COLUMNS], lines)


def relative(path: Path, file: Path) -> str:
    """`path` as seen from the folder of `file`, with forward slashes."""
    return Path(os.path.relpath(path.absolute(), file.absolute().parent)).as_posix()
