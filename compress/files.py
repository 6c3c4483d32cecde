"""Files that are there whole or not at all, and directories that belong to one run."""

import csv
import errno
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from compress.checksums import json_with_checksum, read_text, yaml_with_checksum
from compress.errors import MACHINE, UserError, first_line, printable

# Of whatever place was chosen, and not a mistake in choosing it.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary name beside `path` (same ending) and renames what it wrote to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as failure:
        if failure.errno not in MACHINE:
            raise
        raise _named(failure, path) from failure
    except Exception as failure:
        # PyTorch and safetensors have errors of their own, which do not say that the disk is full.
        refusal = _refusal(temporary)
        if refusal is None:
            raise
        raise _named(refusal, path) from failure
    finally:
        # A directory that vanished took it along.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _named(failure: OSError, path: Path) -> OSError:
    """The same failure of the machine, which says that `path` could not be written."""
    return OSError(failure.errno, failure.strerror, str(path))


def _refusal(temporary: Path) -> OSError | None:
    """Why nothing more can be written to `temporary`, if that is so."""
    try:
        with temporary.open("ab") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as failure:
        return failure
    return None


def remove_leftovers(directory: Path, stem: str = "*") -> None:
    """Removes what `write_atomically` could not, because its process was killed, of files called `stem`.

    Nobody else may be writing such files.
    """
    for path in directory.glob(f".{stem}-????????*"):
        if path.is_file() and is_leftover(path):
            path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether `path` has a name as `write_atomically` gives its temporary files."""
    return re.fullmatch(r"\..+-[a-z0-9_]{8}(\.\w+)?", path.name) is not None


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_yaml(path: Path, text: str) -> None:
    """Writes the YAML `text` with its checksum, see `compress.checksums.read_text`."""
    write_text(path, yaml_with_checksum(text))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content`, which is not empty, with its checksum, see `read_json`."""
    write_text(path, json_with_checksum(content))


def read_json(path: Path, accepted: str) -> dict[str, Any]:
    """What `write_json` wrote. Raises UserError, which says what is `accepted` instead, where it cannot be read."""
    try:
        content = json.loads(read_text(path, accepted))
        if not isinstance(content, dict):
            raise ValueError("no mapping")
    except (OSError, ValueError, RecursionError) as failure:
        reason = getattr(failure, "strerror", None) or first_line(failure)
        raise UserError(f"{path}: cannot be read ({reason}); accepted: {accepted}") from None
    return content


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes the names of the `columns` and a line for each of `rows`; a cell is empty where a key is missing."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(columns), lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: _no_formula(value) for key, value in row.items()} for row in rows)

    write_atomically(path, write)


def _no_formula(value: Any) -> Any:
    """Text that a spreadsheet would compute gets an apostrophe in front; numbers, as text too, stay what they are.

    Control characters are escaped: a cell is one line, and may be shown by a terminal.
    """
    if not isinstance(value, str):
        return value
    value = printable(value)
    if not value.startswith(("=", "+", "-", "@")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def check_can_be_made(directory: Path, key: str) -> None:
    """Raises UserError where the `directory` that the user gave as `key` can be neither made nor written.

    Nothing is made, so a file system that refuses for other reasons is not found out.
    """
    place, reason = directory.absolute(), ""
    try:
        while not _is_there(place):
            place = place.parent
        if not place.is_dir():
            reason = f"{place} is no directory"
        elif not os.access(place, os.W_OK | os.X_OK):
            reason = f"{place} may not be written"
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or first_line(failure)
    if reason:
        raise UserError(f"{key}: found {directory}, which cannot be made ({reason}); accepted: a new directory")


def _is_there(path: Path) -> bool:
    """Whether there is anything at `path`, a link to nothing too. Raises OSError where that cannot be known."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def make_chosen(directory: Path, key: str) -> None:
    """Makes the `directory` that the user gave as `key`, if it is not there. Raises UserError where that cannot be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        if failure.errno in NO_ROOM:
            raise
        raise UserError(
            f"{key}: found {directory}, which cannot be made ({failure.strerror}); accepted: a new directory"
        ) from None


def make_directory(parent: Path, name: str) -> Path:
    """Makes `parent/name`, or `name-2`, `name-3` and so on where that is taken, and nobody else gets the same.

    Raises UserError where `parent` cannot be written.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in range(1, 10_000):
            directory = parent / (name if number == 1 else f"{name}-{number}")
            try:
                directory.mkdir()
            except FileExistsError:
                continue
            return directory
    except OSError as failure:
        if failure.errno in NO_ROOM:
            raise
        raise UserError(
            f"output_directory: found {parent}, where nothing can be written ({failure.strerror}); accepted: a folder"
        ) from None
    raise UserError(f"output_directory: {parent} holds 10,000 directories called {name}; accepted: another folder")
