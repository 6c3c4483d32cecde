"""Checksums in the files that a run writes and that are read again, so that damage is found before it is used.

A JSON or YAML file has that of its text in a line of its own, a row of `metrics.csv` that of the rows so far, and a
file of torch.save those of its zip archive. Model files and teachers have one in their header, see
`compress.export.container`. What has none, because it was written by hand, say, is read as it is.
"""

import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.errors import UserError, first_line

LINE = re.compile(r'(?P<before>\{\n)?(?:# sha256: |  "sha256": ")(?P<sum>[0-9a-f]{64})(?:",)?\n')
# The same in a file whose lines somebody has changed.
MOVED = re.compile(r'^\s*\{?\s*(?:# sha256: |"sha256": ?")[0-9a-f]{64}', re.MULTILINE)
COLUMN = "crc32"
ARCHIVE = b"PK\x03\x04"  # how a zip archive begins


def digest(text: str) -> str:
    """The SHA-256 of `text`, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of the bytes of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def yaml_with_checksum(text: str) -> str:
    return f"# sha256: {digest(text)}\n{text}"


def json_with_checksum(content: Mapping[str, Any]) -> str:
    """`content`, which is not empty, as JSON whose first entry is the checksum of the others."""
    text = json.dumps(content, indent=2) + "\n"
    return text.replace("{\n", f'{{\n  "sha256": "{digest(text)}",\n', 1)


def read_text(path: Path, accepted: str = "") -> str:
    """The text of a JSON or YAML file without its checksum.

    Raises UserError where it is not what the checksum says, OSError and UnicodeDecodeError as reading does. `accepted`
    says how to go on.
    """
    text = path.read_bytes().decode()
    line = LINE.match(text)
    if line is None and MOVED.search(text) is None:
        return text
    rest = (line["before"] or "") + text[line.end() :] if line else text
    if line is None or digest(rest) != line["sum"]:
        accepted = accepted or "the file as it was written, or without the line sha256 if it was changed on purpose"
        raise UserError(f"{path}: cannot be read (its content does not match its checksum); accepted: {accepted}")
    return rest


def check_archive(path: Path) -> None:
    """Raises ValueError, which says what is wrong, where a file of torch.save is not what its checksums say.

    Files from before torch 1.6 are no archives, and have none.
    """
    with path.open("rb") as stream:
        if stream.read(len(ARCHIVE)) != ARCHIVE:
            return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as failure:  # a damaged archive can fail anywhere in the decoder, with any exception
        raise ValueError(first_line(failure)) from None
    if damaged is not None:
        raise ValueError(f"{damaged} does not match its checksum; one saved without checksums is to be saved with them")


def rows_with_checksums(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The `rows` of a table, each with the checksum of it and of all before it in the column COLUMN."""
    before = ""
    for row in rows:
        before = _row_sum(row, before)
        yield {**row, COLUMN: before}


def checked_rows(rows: Iterable[Mapping[str, str]]) -> Iterator[dict[str, str]]:
    """The `rows` that a csv.DictReader gives, without their checksums and empty cells.

    Raises ValueError where a row is not what its checksum says.
    """
    before = ""
    for row in rows:
        if None in row:
            raise ValueError("a row has more cells than there are columns")
        if any(COLUMN in key and key != COLUMN for key in row):
            raise ValueError("the header and the first row are one line")
        content = _filled(row)
        # Where the name of the column is damaged, its numbers are still those sums.
        column = COLUMN if COLUMN in row else list(row)[-1]
        rest = {key: value for key, value in content.items() if key != column}
        before = _row_sum(rest, before)
        if (content.get(column) == before) != (column == COLUMN):
            raise ValueError("a row does not match its checksum")
        yield rest if column == COLUMN else content


def _row_sum(row: Mapping[str, Any], before: str) -> str:
    cells = sorted([key, str(value)] for key, value in _filled(row).items())
    # A number like those beside it, for whatever reads the table as numbers.
    return str(zlib.crc32(json.dumps([before, cells]).encode()))


def _filled(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value not in ("", None)}
