"""A column of the trade-off is declared in one place: from there it reaches every file, table, page and logger."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from rich.console import Console

from compress.benchmarks.synthetic import write_runs
from compress.errors import UserError
from compress.paths import PACKAGE
from compress.results.record import Record
from compress.results.tradeoff import COLUMNS, Column, Row, table

FIELD = """\
    points_per_kb: Annotated[
        float,
        Column("points of test accuracy for a kilobyte", "points/kB", digits=3, below_one="!", loggers="all",
               derive=lambda row: 1e5 * row.test_accuracy / row.bytes),
    ] = field(init=False)
"""
# Everything that a run and a report make of rows, as they make it.
USE = """
import os
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from compress.benchmarks.synthetic import write_runs
from compress.report.formats import write_reports
from compress.results.loggers import log_results, log_tradeoff
from compress.results.metrics_csv import MetricsCSV
from compress.results.record import Record
from compress.results.tradeoff import table
from compress.results.wandb_run import WandbRun

[directory] = write_runs(Path("runs"), 1, epochs=1, layers=3)
record = Record.read(directory / "result.json")
Console(width=120).print(table(record.rows, "table"))
write_reports([Path("runs")], [Path(f"report.{suffix}") for suffix in ("html", "md", "csv")])
logger, run = MetricsCSV("."), WandbRun(".", offline=True, log_models=False)
config = {"method": {"stem": "kd"}, "student": {"stem": "resnet8"}, "data": {"stem": "digits"}, "seed": 0}
run.begin(OmegaConf.create(config))
log_tradeoff([logger, run], record.rows, 1)
log_results([logger, run], record)
"""


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """The folder with all that is made of an invented run by a copy of the package with one more field, and stdout."""
    folder = tmp_path_factory.mktemp("column")
    package = folder / "copy" / "compress"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    declarations = package / "results" / "tradeoff.py"
    text = declarations.read_text()
    assert text.count("    file: Annotated[") == 1
    declarations.write_text(text.replace("    file: Annotated[", f"{FIELD}    file: Annotated["))
    environment = {"PYTHONPATH": str(package.parent), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def expected(folder):
    """The new column, computed from the record, in order of the rows."""
    record = json.loads((folder / "runs" / "0" / "result.json").read_text())
    return [100 * row["test_accuracy"] / (row["bytes"] / 1000) for row in record["tradeoff"]]


def printed_values(folder):
    """The new column as in tables, with its mark behind what is below 1."""
    texts = [f"{value:.3f}{'!' if value < 1 else ''}" for value in expected(folder)]
    assert len({text[-1] == "!" for text in texts}) == 2
    return texts


@pytest.mark.slow
def test_a_new_column_is_in_the_files_of_a_run(used):
    folder, _ = used
    record = json.loads((folder / "runs" / "0" / "result.json").read_text())
    assert [row["points_per_kb"] for row in record["tradeoff"]] == pytest.approx(expected(folder))
    for path in (folder / "runs" / "0" / "tradeoff.csv", folder / "report.csv"):
        with path.open() as stream:
            rows = list(csv.DictReader(stream))
        assert [float(row["points_per_kb"]) for row in rows] == pytest.approx(expected(folder), rel=1e-5)


@pytest.mark.slow
def test_a_new_column_is_in_every_table(used):
    folder, printed = used
    texts = printed_values(folder)
    markdown = (folder / "report.md").read_text()
    for text in (printed, markdown):
        assert "points/kB" in text
        assert all(value in text for value in texts)


@pytest.mark.slow
def test_a_new_column_is_on_the_page(used):
    folder, _ = used
    page = (folder / "report.html").read_text(encoding="utf-8")
    content = json.loads(re.search(r'<script type="application/json" id="content">(.*?)</script>', page)[1])
    [column] = [column for column in content["columns"] if column["key"] == "points_per_kb"]
    assert (column["heading"], column["digits"]) == ("points/kB", 3)
    place = content["keys"].index("points_per_kb")
    assert [line[place] for line in content["single"]] == pytest.approx(expected(folder), rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium")
def test_a_browser_shows_the_new_column(used):
    folder, _ = used
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    dumped = subprocess.run([*command, (folder / "report.html").as_uri()], capture_output=True, text=True, check=True)
    table = dumped.stdout[dumped.stdout.index('<table id="table">') :]
    assert ">points/kB<" in table
    assert all(f'<td class="number">{text}</td>' in table for text in printed_values(folder))


@pytest.mark.slow
def test_a_new_column_reaches_the_loggers(used):
    folder, _ = used
    with (folder / "metrics.csv").open() as stream:
        [row] = csv.DictReader(stream)
    assert float(row["tradeoff/fp32/points_per_kb"]) == pytest.approx(expected(folder)[0])
    [path] = folder.glob("wandb/offline-run-*/files/media/table/tradeoff_*.table.json")
    table = json.loads(path.read_text())
    place = table["columns"].index("points_per_kb")
    assert [line[place] for line in table["data"]] == pytest.approx(expected(folder))


def test_without_labels_there_is_no_accuracy_to_compute_with(tmp_path):
    [directory] = write_runs(tmp_path, 1, epochs=1, layers=3)
    row = Record.read(directory / "result.json").rows[0]
    assert (row.accuracy_on("validation"), row.accuracy_on("test")) == (row.validation_accuracy, row.test_accuracy)
    without = replace(row, validation_accuracy=None, test_accuracy=None)
    for split in ("validation", "test"):
        with pytest.raises(UserError, match=r"^fp32: found no accuracy, because the images had no labels$"):
            without.accuracy_on(split)


@pytest.mark.parametrize(("speedup", "text"), [(0.43, "0.4x!"), (0.96, "1.0x"), (2.31, "2.3x"), (None, "")])
def test_a_file_that_is_slower_than_the_float_one_is_marked(speedup, text, tmp_path):
    [directory] = write_runs(tmp_path, 1, epochs=1, layers=3)
    fp32, row, *_ = Record.read(directory / "result.json").rows
    rows = [fp32, replace(row, runtime="openvino", speedup=speedup)]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(rows, "table"))
    lines = console.export_text().splitlines()
    assert any("speed" in line and "!: slower" not in line for line in lines) == (speedup is not None)
    [line] = [line for line in lines if line.startswith(" gpfq 8 bit openvino")]
    assert line.split()[-1] == (text or COLUMNS["latency_ms"].printed(row.latency_ms))
    assert COLUMNS["speedup"].printed(speedup) == text


def test_a_change_that_rounds_to_zero_has_no_minus():
    column = Column("a change", "change", scale=100, signed=True)
    assert [column.printed(change) for change in (-0.00002, 0.0, -0.0002)] == ["+0.00", "+0.00", "-0.02"]


def test_every_field_of_a_row_says_what_it_means():
    assert list(COLUMNS) == [field.name for field in fields(Row)]
    assert all(column.meaning for column in COLUMNS.values())


def test_a_network_whose_codes_are_all_one_has_a_row_that_is_read_back(tmp_path):
    [directory] = write_runs(tmp_path, 1, epochs=1, layers=3)
    record = Record.read(directory / "result.json")
    row = replace(record.rows[-1], bits=0.0, levels=None, first_last_bits=None)
    record.model_copy(update={"rows": (*record.rows, row)}).write(directory)
    assert Record.read(directory / "result.json").rows[-1] == row
    assert row.width == "0.0 bits/weight"
