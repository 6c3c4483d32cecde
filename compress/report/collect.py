"""Every run below some directories, as `Run`s and as a CSV of their trade-offs; needs neither PyTorch nor Hydra.

A directory with a `result.json` is a finished run, one with a `config.yaml` alone was interrupted.
"""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from compress.errors import UserError
from compress.files import write_atomically
from compress.report.finished import Run, read_run

# Of a run, in `write_summary`, beside the columns of `compress.results.tradeoff`.
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
    directories = {directory.resolve(): directory for path in paths for directory in run_directories(path)}
    found = sorted(directories.values(), key=lambda each: _natural(str(each)))
    finished = [directory for directory in found if (directory / "result.json").exists()]
    unfinished = tuple(directory for directory in found if not (directory / "result.json").exists())
    top = Path(os.path.commonpath([str(each.parent.absolute()) for each in found])) if found else Path()
    runs, problems = [], []
    for directory in finished:
        try:
            runs.append(read_run(directory, directory.absolute().relative_to(top).as_posix(), problems))
        except UserError as problem:
            problems.append(f"{problem}; the run is left out")
    if not runs:
        why = [f"{len(problems)} that cannot be read ({problems[0]})"] if problems else []
        why += [f"{len(unfinished)} not finished"] if unfinished else []
        said = ": ".join(["found no finished run", *([", ".join(why)] if why else [])])
        where = ", ".join(map(str, paths))
        raise UserError(f"{where}: {said}; accepted: run directories, or a folder of them")
    return Collection(tuple(runs), unfinished, tuple(problems))


def run_directories(path: Path) -> Iterator[Path]:
    """The directories in and below `path` that hold a run, finished or not; hidden ones are not looked into."""
    for folder, folders, files in os.walk(path):
        if "result.json" in files or "config.yaml" in files:
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
        directory = relative(run.directory, path)
        about = [directory, run.data, run.experiment, run.method, run.student, run.teacher, run.seed, run.started]
        about = dict(zip(ABOUT, [*about, " ".join(run.overrides)], strict=True))
        for row in run.rows:
            lines.append(about | asdict(row) | {"file": f"{directory}/{row.file}"})

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(lines[0]) if lines else ABOUT, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)

    write_atomically(path, write)


def relative(path: Path, file: Path) -> str:
    """`path` as seen from the folder of `file`, with forward slashes."""
    return Path(os.path.relpath(path.absolute(), file.absolute().parent)).as_posix()
