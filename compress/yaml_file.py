"""YAML that was received: read only where it takes about as much memory as its text, and no deep recursion."""

from pathlib import Path
from typing import Any

import yaml

from compress.errors import UserError, first_line

# libyaml is ten times faster, and not in every build of PyYAML.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DEEPEST = 50
# Nodes that aliases may add to those that are written down.
REPEATED = 10_000


def load(text: str) -> Any:
    """The content of a YAML text. Raises YAMLError as PyYAML does, and as `check` does."""
    check(text)
    return yaml.load(text, LOADER)


def read(path: Path) -> Any:
    """The content of a YAML file. Raises UserError as `check_file` does."""
    return yaml.load(check_file(path), LOADER)


def check_file(path: Path) -> str:
    """The text of a YAML file. Raises UserError, which names it, where `check` refuses it or it is no YAML."""
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        check(text)
        return text
    except (yaml.YAMLError, UnicodeDecodeError) as failure:
        mark = getattr(failure, "problem_mark", None)
        # libyaml takes the end of the text for another line.
        place = f"{path}, line {min(mark.line + 1, len(text.splitlines()))}" if mark else str(path)
        reason = getattr(failure, "problem", None) or first_line(failure)
        raise UserError(f"{place}: found what cannot be read as YAML ({reason}); accepted: a YAML file") from None


def check(text: str) -> None:
    """Raises YAMLError for a text that nests too deeply, or whose aliases stand for too much."""
    sizes: dict[str | None, int] = {}
    repeated = 0
    # The anchor of each node that is open, and how many nodes are in it so far.
    opened: list[tuple[str | None, int]] = []

    def add(anchor: str | None, count: int) -> None:
        if anchor is not None:
            sizes[anchor] = count
        if opened:
            outer, before = opened[-1]
            opened[-1] = outer, before + count

    for event in yaml.parse(text, LOADER):
        if isinstance(event, yaml.AliasEvent):
            count = sizes.get(event.anchor, REPEATED + 1)  # of a node that holds the alias itself there is no end
            repeated += count
            if repeated > REPEATED:
                raise yaml.YAMLError(f"its aliases stand for more than {REPEATED:,} nodes")
            add(None, count)
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, 1))
            if len(opened) > DEEPEST:
                raise yaml.YAMLError(f"it nests more than {DEEPEST} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            add(*opened.pop())
        elif isinstance(event, yaml.ScalarEvent):
            add(event.anchor, 1)
