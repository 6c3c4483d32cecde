"""`result.json` is read as it was written, by the one class that writes it."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from compress.benchmarks.synthetic import write_runs
from compress.checksums import json_with_checksum
from compress.errors import UserError
from compress.results.record import Record
from compress.results.tradeoff import Row


def test_a_record_is_read_as_it_was_written(tmp_path):
    [directory] = write_runs(tmp_path, 1, epochs=1, layers=3)
    record = Record.read(directory / "result.json")
    record.write(tmp_path)
    assert (tmp_path / "result.json").read_bytes() == (directory / "result.json").read_bytes()
    assert Record.read(tmp_path / "result.json") == record


def test_widths_stay_whole_numbers_where_they_are(tmp_path):
    read = TypeAdapter(Row).validate_python
    [directory] = write_runs(tmp_path, 1, epochs=1, layers=3)
    row = json.loads((directory / "result.json").read_text())["tradeoff"][1]
    assert [str(read(row | {"bits": bits}).bits) for bits in (8, 2.75)] == ["8", "2.75"]
    coded = [read(row | {"bits": bits, "levels": None}) for bits in (2, 2.0, 2.75)]
    assert [row.name.removeprefix("gpfq ") for row in coded] == [
        "2.0 bits/weight",
        "2.0 bits/weight",
        "2.75 bits/weight",
    ]
    assert all(row.coded for row in coded)
    assert not read(row).coded
    assert not read(row | {"bits": 32, "levels": None}).coded


@pytest.mark.parametrize("directory", [".", "..", "1-prune/..", "/tmp", "1-"])
def test_a_stage_lies_in_the_directory_of_its_run(tmp_path, directory):
    about = {"name": "a", "overrides": [], "seconds": 1.0, "pruning": None, "student": {"model": "a"}}
    [run] = write_runs(tmp_path, 1, epochs=1, layers=3)
    record = json.loads((run / "result.json").read_text())
    for place, refused in (("1-prune", False), (directory, True)):
        record["stages"] = [about | {"directory": place, "variant": record["tradeoff"][0]}]
        del record["sha256"]
        (tmp_path / "result.json").write_text(json_with_checksum(record))
        record = json.loads((tmp_path / "result.json").read_text())
        with pytest.raises(UserError, match=r"stages\.0\.directory") if refused else nullcontext():
            Record.read(tmp_path / "result.json")


def test_a_missing_record_is_named():
    path = Path("nowhere", "result.json")
    with pytest.raises(UserError, match=r"^nowhere/result\.json: cannot be read \(No such file or directory\)"):
        Record.read(path)
