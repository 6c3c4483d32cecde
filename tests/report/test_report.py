"""The report of real runs and of damaged ones: what is read, what is said, and the formats without a browser."""

import csv
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import compress
from compress.benchmarks.synthetic import write_runs
from compress.checksums import json_with_checksum, read_text, yaml_with_checksum
from compress.errors import UserError
from compress.report.collect import collect, write_summary
from compress.report.formats import write_reports
from compress.results.tradeoff import Row

SCRIPT = Path(__file__).parents[2] / "scripts" / "report.py"
SMALL = ["student=resnet8", "method=supervised", "trainer.max_epochs=2", "data.limit=200", "quantizer=rtn"]
SMALL += ["quantizer.bits=[4,2]", "quantizer.calibration_images=32", "trainer.log_every=0"]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder with two runs of this project that differ in the seed alone."""
    folder = tmp_path_factory.mktemp("real")
    for seed in (0, 1):
        compress.run([*SMALL, f"seed={seed}", f"output_directory={folder}"])
    return folder


@pytest.fixture
def runs(tmp_path):
    """A folder with three run directories that a test may damage."""
    write_runs(tmp_path / "runs", 3, epochs=3, layers=3)
    return tmp_path / "runs"


def script(*arguments, **options):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.slow
def test_a_real_run_is_read_back_whole(real):
    collection = collect([real])
    assert (len(collection.runs), collection.problems, collection.unfinished) == (2, (), ())
    for seed, run in enumerate(sorted(collection.runs, key=lambda run: run.seed)):
        assert (run.seed, run.method, run.student, run.data) == (seed, "supervised", "resnet8", "Digits (200 images)")
        assert run.record.overrides == [*SMALL, f"seed={seed}", f"output_directory={real}"]
        record = json.loads((run.directory / "result.json").read_text())
        assert list(run.rows) == [Row(**row) for row in record["tradeoff"]]
        with (run.directory / "metrics.csv").open() as stream:
            lines = [line for line in csv.DictReader(stream) if line["epoch"]]
        assert run.curves["val/accuracy"] == ((0, 1), tuple(float(line["val/accuracy"]) for line in lines))
        assert not any(name.startswith("tradeoff") for name in run.curves)
        for row in run.rows[1:]:
            layers = record["layers"][Path(row.file).name]["quantized"]
            assert [(name, layer.bits, layer.error) for name, layer in run.layers(row).items()] == [
                (name, layer["bits"], layer["error"]) for name, layer in layers.items()
            ]
            assert {layer.bits for layer in list(run.layers(row).values())[1:-1]} == {row.bits}


def test_markdown_has_the_mean_over_the_seeds_and_links_that_lead_somewhere(real, tmp_path):
    write_reports([real], [tmp_path / "deep" / "report.md"])
    text = (tmp_path / "deep" / "report.md").read_text()
    records = [json.loads(path.read_text()) for path in real.rglob("result.json")]
    for index, name in enumerate(["fp32", "rtn 4 bit", "rtn 2 bit"]):
        values = []
        for column in ("validation_accuracy", "test_accuracy"):
            accuracies = [100 * record["tradeoff"][index][column] for record in records]
            values.append(f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}")
        assert f"| {name} | 2 | {' | '.join(values)} |" in text
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) == 2 * 9
    assert all((tmp_path / "deep" / link).is_file() for link in links)


def test_csv_has_a_line_per_variant_of_each_run(real, tmp_path):
    write_reports([real], [tmp_path / "report.csv"])
    with (tmp_path / "report.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == 2 * 3
    for line in lines:
        record = json.loads((tmp_path / line["run"] / "result.json").read_text())
        [row] = [row for row in record["tradeoff"] if line["file"] == f"{line['run']}/{row['file']}"]
        assert (tmp_path / line["file"]).stat().st_size == int(line["bytes"]) == row["bytes"]
        assert float(line["test_accuracy"]) == row["test_accuracy"]
        assert (int(line["seed"]), line["method"]) == (record["seed"], "supervised")


def test_a_summary_of_no_runs_is_a_heading(tmp_path):
    write_summary(tmp_path / "summary.csv", [])
    assert (tmp_path / "summary.csv").read_text().startswith("run,data,experiment,method")


def test_a_run_found_twice_counts_once_and_hidden_folders_are_not_searched(runs):
    shutil.copytree(runs / "0", runs / ".cache" / "0")
    assert [run.name for run in collect([runs, runs / "1", runs / "." / "1"]).runs] == ["0", "1", "2"]


def test_one_run_directory_is_a_report(runs):
    assert [run.name for run in collect([runs / "2"]).runs] == ["2"]


def test_columns_and_keys_that_are_new_or_not_there_yet_are_no_damage(runs):
    path = runs / "0" / "result.json"
    record = json.loads(read_text(path))
    for row in record["tradeoff"]:
        row["energy"] = 3
        del row["macs"]
    record["weather"] = record["student"]["mood"] = "good"
    del record["layers"], record["started"]
    path.write_text(json.dumps(record))
    collection = collect([runs])
    assert (len(collection.runs), collection.problems) == (3, ())
    assert collection.runs[0].rows[1].macs is None
    for name in ("report.html", "report.md", "report.csv"):
        write_reports([runs], [runs / name])


def edit(key, value):
    def change(text):
        record = json.loads(text)
        part = record
        *path, last = key
        for each in path:
            part = part[each]
        part[last] = value
        return json.dumps(record)

    return change


DAMAGED = [
    ("result.json", lambda text: text[: len(text) // 2], "result.json: cannot be read (content: invalid json", 2),
    ("result.json", lambda text: "[]", "(content: input should be an object)", 2),
    ("result.json", lambda text: "[" * 100_000, "(content: invalid json", 2),
    ("result.json", edit(["format"], 2), "(format: input should be 1)", 2),
    ("result.json", edit(["tradeoff"], []), "(tradeoff: ", 2),
    ("result.json", edit(["tradeoff", 1, "bytes"], "many"), "(tradeoff.1.bytes: ", 2),
    ("result.json", edit(["tradeoff", 1, "agreement"], None), "(tradeoff.1.agreement: ", 2),
    ("result.json", edit(["tradeoff", 0, "test_accuracy"], float("nan")), "(tradeoff.0.test_accuracy: ", 2),
    ("result.json", edit(["tradeoff", 0, "test_accuracy"], 91.3), "(tradeoff.0.test_accuracy: ", 2),
    ("result.json", edit(["student"], None), "(student: ", 2),
    ("result.json", lambda text: json_with_checksum(json.loads(text)).replace("MNIST", "mnist"), "its checksum", 2),
    ("config.yaml", lambda text: yaml_with_checksum(text).replace("lr", "lR"), "its checksum", 2),
    ("config.yaml", lambda text: "a: [1", "config.yaml: damaged", 2),
    ("config.yaml", lambda text: "text", "config.yaml: found no mapping", 2),
    ("config.yaml", lambda text: None, "config.yaml: cannot be read", 2),
    ("metrics.csv", lambda text: text + "1,x,y\n", "metrics.csv: damaged", 3),
    ("metrics.csv", lambda text: "\x00", "metrics.csv: damaged", 3),
    ("result.json", edit(["layers"], {"a.safetensors": 3}), "(layers.a.safetensors: ", 2),
]


@pytest.mark.parametrize(("name", "damage", "message", "remaining"), DAMAGED)
def test_what_is_damaged_is_named_and_the_others_are_shown(runs, name, damage, message, remaining):
    path = runs / "1" / name
    changed = damage(read_text(path))
    if changed is None:
        path.unlink()
    else:
        path.write_text(changed)
    collection = collect([runs])
    [problem] = collection.problems
    assert str(runs / "1") in problem
    assert message in problem
    assert len(problem.splitlines()) == 1
    assert len(collection.runs) == remaining
    write_reports([runs], [runs / "report.md", runs / "report.html"])
    assert "Not in this report" in (runs / "report.md").read_text()


@pytest.mark.slow
def test_the_script_warns_of_damage_and_counts_what_is_not_finished(runs):
    (runs / "0" / "result.json").write_text("{")
    (runs / "1" / "result.json").unlink()
    done = script(runs, "-o", runs / "report.csv")
    assert (done.returncode, done.stdout) == (0, f"1 run in {runs / 'report.csv'}\n")
    warning, note = done.stderr.splitlines()
    assert warning.startswith(f"warning: {runs / '0' / 'result.json'}: cannot be read (content: ")
    assert note == f"note: 1 not finished and left out, such as {runs / '1'}"


@pytest.mark.slow
def test_the_default_is_report_html_in_the_working_directory(runs, tmp_path):
    done = script("runs", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3 runs in report.html\n", "")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


MISTAKES = [
    (["nowhere"], "nowhere: found no such directory; accepted: directories"),
    (["runs/0/result.json"], "runs/0/result.json: found a file; accepted: directories"),
    (["empty"], "empty: found no finished run; accepted: run directories, or a folder of them"),
    (["damaged"], "damaged: found no finished run: 1 that cannot be read"),
    (["runs", "-o", "report.pdf"], "report.pdf: found the suffix '.pdf'; accepted: .html, .md, .csv, .png"),
    (["runs", "-o", "report"], "report: found the suffix ''; accepted: .html, .md, .csv, .png"),
    (["runs", "-o", "folder.md"], "folder.md: found a directory; accepted: a file to write"),
    (["runs", "-o", "file/report.md"], "file/report.md: cannot be written"),
    (
        ["runs", "-o", "good.csv", "-o", "report.pdf"],
        "report.pdf: found the suffix '.pdf'; accepted: .html, .md, .csv, .png",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(runs, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.md").mkdir()
    (tmp_path / "file").write_text("")
    shutil.copytree(runs / "0", tmp_path / "damaged" / "0")
    (tmp_path / "damaged" / "0" / "result.json").write_text("")
    before = sorted(tmp_path.rglob("*"))
    done = script(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert sorted(tmp_path.rglob("*")) == before


def test_without_plotly_the_page_names_the_extra_and_the_other_formats_work(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UserError, match=r"plotly is not installed; pip install 'compress\[report\]'"):
        write_reports([runs], [runs / "report.html"])
    write_reports([runs], [runs / "report.md"])


@pytest.mark.slow
def test_help_says_what_it_writes():
    done = script("--help")
    assert done.returncode == 0
    for word in ("report.html", ".md", ".csv", "Pareto"):
        assert word in done.stdout


@pytest.mark.slow
def test_a_report_needs_neither_pytorch_nor_hydra(runs):
    code = """
import sys
from pathlib import Path
from compress.report.formats import write_reports
write_reports([Path(sys.argv[1])], [Path(sys.argv[1]) / "report.html"])
print(sorted({"torch", "hydra", "pytorch_lightning", "matplotlib", "wandb"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code, runs], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def capstone(folder, method, seed, accuracies, *typed, quantizer="gpfq", data="CIFAR10", experiment="capstone_cifar10"):
    """A run of the replaced project's experiment, with those accuracies in % by width."""
    [directory] = write_runs(folder / f"{method}-{seed}-{min(accuracies)}-{len(typed)}", 1, epochs=1, layers=3)
    record = json.loads(read_text(directory / "result.json"))
    [row] = record["tradeoff"][:1]
    record |= {"seed": seed, "overrides": [f"experiment={experiment}", f"method={method}", *typed, f"seed={seed}"]}
    record["data"]["name"], record["student"]["model"] = data, "resnet18"
    record["tradeoff"] = [
        row
        | {"quantizer": "none" if bits == 32 else quantizer, "bits": bits, "test_accuracy": value / 100}
        | {"levels": None if bits == 32 else 2**bits, "file": f"models/{bits}.safetensors"}
        for bits, value in accuracies.items()
    ]
    (directory / "result.json").write_text(json.dumps(record))
    config = yaml.safe_load((directory / "config.yaml").read_text())
    config |= {"seed": seed, "method": {"stem": method, "typed": list(typed)}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))


def test_the_replaced_projects_figures_stand_beside_ours(tmp_path):
    runs = tmp_path / "runs"
    for seed, offset in ((0, 0.0), (1, 2.0)):
        capstone(runs, "kd", seed, {32: 90 + offset, 2: 70 + offset})
    capstone(runs, "kd", 0, {32: 80, 2: 60}, "optimizer.lr=1")
    capstone(runs, "qat", 0, {32: 10, 2: 88}, "method.weight_bits=2", quantizer="lsq")
    capstone(runs, "qat", 0, {32: 10, 3: 89}, "method.weight_bits=3", quantizer="lsq")
    write_reports([runs], [tmp_path / "report.md", tmp_path / "report.html"])
    text = (tmp_path / "report.md").read_text()
    section = text[text.index("## The replaced project: capstone") :].splitlines()
    same = "(89.69) |  |  |  | (86.47) | (82.40)"
    assert f"| kd | resnet18, CIFAR10 | 91.00 ± 1.41 (90.77) | {same} | 71.00 ± 1.41 (71.87) |" in section
    assert f"| kd | resnet18, CIFAR10, optimizer.lr=1 | 80.00 (90.77) | {same} | 60.00 (71.87) |" in section
    assert "| qat | resnet18, CIFAR10 |  |  |  |  |  |  | 89.00 | 88.00 |" in section
    [line] = [line for line in section if line.startswith("| kd\\_mixup |")]
    assert line.startswith("| kd\\_mixup |  | (95.77) | (95.45) |  |  |  | (94.20 to 94.66) |")
    assert any("chose checkpoints and scales on the test set" in line for line in section)
    assert "71.00 ± 1.41 (71.87)" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_without_known_figures_ours_stand_alone(tmp_path):
    capstone(tmp_path / "runs", "kd", 0, {32: 70, 8: 69}, data="CIFAR100", experiment="capstone_cifar100")
    write_reports([tmp_path / "runs"], [tmp_path / "report.md"])
    text = (tmp_path / "report.md").read_text()
    assert "no figures of the replaced project are known" in text
    assert "| kd | resnet18, CIFAR100 | 70.00 | 69.00 |  |  |  |  |  |  |" in text


def test_other_experiments_have_no_such_table(runs):
    write_reports([runs], [runs / "report.md"])
    assert "replaced project" not in (runs / "report.md").read_text()
