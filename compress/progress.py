"""The console that everything is printed to, and a bar for what takes long."""

import os
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from compress.errors import printable


class _Console(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is printed, alone or in a table, comes through here: some are from files."""
        return super().render_str(printable(text, kept="\n\t"), **options)

    def on_broken_pipe(self) -> None:
        """Goes on without an output whose reader, `head` perhaps, has gone; rich would end the run with exit code 1."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = _Console(highlight=False, soft_wrap=True)


def bar() -> Progress:
    """A bar that vanishes when it is done, and is not drawn where the output is no terminal."""
    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
