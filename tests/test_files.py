"""Tables that a spreadsheet opens, directories that can be made, and texts of files that a terminal shows."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from compress.errors import printable
from compress.files import check_can_be_made, write_csv
from compress.progress import console


def test_a_cell_that_a_spreadsheet_would_compute_is_text(tmp_path):
    cells = ["=1+1", "+data.limit=5", "-cmd", "@SUM(A1)", "\t=1", "\r=1", "plain", "a=b"]
    numbers = [-0.5, "-0.5", "+3", "-1e-05", "-inf", None]
    write_csv(tmp_path / "table.csv", ["cell"], [{"cell": cell} for cell in [*cells, *numbers]])
    with (tmp_path / "table.csv").open(newline="") as stream:
        found = [row["cell"] for row in csv.DictReader(stream)]
    assert found[:8] == ["'=1+1", "'+data.limit=5", "'-cmd", "'@SUM(A1)", r"\t=1", r"\r=1", "plain", "a=b"]
    assert found[8:] == ["-0.5", "-0.5", "+3", "-1e-05", "-inf", ""]


@pytest.mark.slow
def test_a_directory_that_this_user_may_not_write_is_refused():
    root = "import os; os.getuid() == 0 and os.setuid(65534)"
    code = f"from pathlib import Path; from compress.files import check_can_be_made as check; {root}"
    process = subprocess.run(
        [sys.executable, "-c", f"{code}; check(Path('/not/here'), 'key')"], capture_output=True, text=True
    )
    assert process.stderr.splitlines()[-1].endswith(
        "key: found /not/here, which cannot be made (/ may not be written); accepted: a new directory"
    )


def test_what_can_be_made_is_not_refused_and_not_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for place in (".", "new", "new/er", "link/new", "../other", tmp_path / "new", "a/../b"):
        check_can_be_made(Path(place), "key")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x9b2J\x07\x08", r"\x9b2J\x07\x08"),
        ("two\nlines\r", r"two\nlines\r"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\udcff", r"\udcff"),
        ("Katze, 猫, ά, 🐈", "Katze, 猫, ά, 🐈"),
    ],
)
def test_no_text_steers_a_terminal(text, shown, capsys):
    assert printable(text) == shown
    console.print(text.replace("\n", ""), markup=False)
    assert "\x1b" not in capsys.readouterr().out
