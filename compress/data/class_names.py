"""Names of classes in the order of a network's outputs, from a file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import UserError, first_line

ACCEPTED = "a file of one name a line or of a JSON list, each name once, at least 2"


def class_names(given: str | Sequence[str]) -> tuple[str, ...]:
    """The names in the file `given`, or in the list `given`. Raises UserError for anything but two names or more."""
    names = _in_file(Path(given).expanduser()) if isinstance(given, str) else list(given)
    problem = None
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        problem = "something that is no name"
    elif len(names) < 2:
        problem = f"{len(names)} names"
    elif len(set(names)) < len(names):
        problem = f"{next(name for name in names if names.count(name) > 1)!r} twice"
    if problem is not None:
        where = f" in {given}" if isinstance(given, str) else ""
        raise UserError(f"data.class_names: found {problem}{where}; accepted: {ACCEPTED}")
    return tuple(names)


def _in_file(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
        return json.loads(text) if text[:1] in "[{" else [line.strip() for line in text.splitlines()]
    except (OSError, ValueError) as failure:
        raise UserError(
            f"data.class_names: {path} cannot be read ({first_line(failure)}); accepted: {ACCEPTED}"
        ) from None
