"""Text and tables as Markdown."""

import re
from collections.abc import Iterable, Sequence


def escaped(text: str) -> str:
    """As it is, in Markdown: nothing in it is a tag, a link, emphasis or the border of a cell."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", " ".join(text.split()))


def markdown_table(head: Sequence[str], lines: Iterable[Iterable[str]]) -> str:
    """The lines of a Markdown table whose cells are Markdown."""
    first, *others = (f"| {' | '.join(cells)} |" for cells in (head, *lines))
    return "\n".join([first, "|---" * len(head) + "|", *others])
