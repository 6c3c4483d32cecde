"""README.md is short, and a table of measured figures stands beside the command that makes it."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest

from compress.config.compose import compose_jobs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONGEST_README = 150
# Of the command line beside options.
SWITCHES = ("--dry-run", "--cfg", "job")

FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4}.*$", re.MULTILINE)
INLINE = re.compile(r"`[^`\n]*`")
TABLE = re.compile(r"^\|.*\n\|[-| :]+\|\n(?:\|.*(?:\n|\Z))*", re.MULTILINE)
COMMAND = re.compile(r"\bmake [a-z]|\bpython scripts/\w+\.py")
# A table is one of measured figures if a heading of it has such a unit, or a cell begins with a decimal number.
UNIT = re.compile(r"%|\bkB\b|\bms\b|images/s")
DECIMAL = re.compile(r"\| *[+-]?\d[\d,]*\.\d")


def unsourced(text):
    """The first rows of tables of measured figures that have no command in code between the headings around them."""
    # As indented code, whose comments are no headings.
    text = FENCED.sub(lambda block: textwrap.indent(block[0], "    "), text)
    found = []
    for section in re.split(r"^#+ .*$", text, flags=re.MULTILINE):
        code = "\n".join([*INDENTED.findall(section), *INLINE.findall(section)])
        tables = [INLINE.sub("", table) for table in TABLE.findall(section)]
        measured = [table for table in tables if UNIT.search(table.splitlines()[0]) or DECIMAL.search(table)]
        if not COMMAND.search(code):
            found += [table.splitlines()[0] for table in measured]
    return found


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LONGEST_README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_table_of_figures_has_its_command(page):
    assert unsourced(page.read_text(encoding="utf-8")) == []


FIGURES = "| bits | test % |\n|---|---|\n| 8 | 92 |\n"
DECIMALS = "| bits | accuracy |\n|---|---|\n| 8 | 92.1 ± 0.2 |\n"
SETTINGS = "| key | default |\n|---|---|\n| `lr` | `0.05` |\n| from | 0 to 1.5 |\n"


@pytest.mark.parametrize(
    ("page", "headings"),
    [
        (FIGURES, ["| bits | test % |"]),
        (DECIMALS, ["| bits | accuracy |"]),
        (f"{FIGURES}\nBy python scripts/run.py, on one core.\n", ["| bits | test % |"]),
        (f"# One\n\n    make study\n\n## Two\n\n{FIGURES}", ["| bits | test % |"]),
        (f"```sh\n# Two\nls\n```\n\n{FIGURES}\n## Three\n\n```sh\nmake study\n```\n", ["| bits | test % |"]),
        (f"{FIGURES}\n{DECIMALS}", ["| bits | test % |", "| bits | accuracy |"]),
        (f"{FIGURES}\n    make study\n", []),
        (f"`python scripts/benchmark.py files`:\n\n{DECIMALS}", []),
        (f"{FIGURES}\n```sh\n# once\npython scripts/run.py\n```\n", []),
        (SETTINGS, []),
    ],
)
def test_a_table_without_its_command_is_found(page, headings):
    assert unsourced(page) == headings


def commands():
    """The commands of all pages that begin a run or a sweep, with their page."""
    for page in PAGES:
        text = FENCED.sub(lambda block: textwrap.indent(block[0], "    "), page.read_text(encoding="utf-8"))
        code = "\n".join(INDENTED.findall(text)).replace("\\\n", "")
        for line in re.findall(r"python scripts/run\.py (.*)", code):
            words = shlex.split(line, comments=True)
            # What goes on with a run is about a directory of the reader's.
            if not any(re.match(r"resume=|sweep=|--verify|--help", word) for word in words):
                yield pytest.param([word for word in words if word not in SWITCHES], id=f"{page.stem}: {line[:60]}")


@pytest.mark.slow
@pytest.mark.parametrize("words", commands())
def test_a_run_of_a_page_has_options_and_keys_that_there_are(words):
    assert compose_jobs([word for word in words if word != "-m"], multirun="-m" in words)
