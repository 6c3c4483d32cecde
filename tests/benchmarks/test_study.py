"""The study on a slice, its parts under their real settings, and its page."""

import json
import os
import re
import runpy
import statistics
import sys
from pathlib import Path

import pytest
import yaml

from compress.benchmarks.peer_comparison import IMAGES
from compress.benchmarks.study import QUANTIZERS, Part, Sweep, page, parts
from compress.config.compose import compose_jobs
from compress.errors import UserError

SCRIPT = Path(__file__).parents[2] / "scripts" / "study.py"
FASHION_MNIST = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))


def table(text):
    """The cells of the first table of a page."""
    lines = re.search(r"^\|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])]


@pytest.mark.slow
@pytest.mark.parametrize("part", parts(Path("outputs/study"), seeds=1), ids=lambda part: part.name)
def test_a_part_of_the_study_composes(part):
    for sweep in part.sweeps:
        jobs = compose_jobs(sweep.overrides, multirun=True)
        assert [job.overrides for job in jobs] == sweep.typed
        budgets = {(job.config.trainer.max_epochs, job.config.data.limit) for job in jobs}
        assert len(budgets) == 1
        assert budgets.pop()[1] is None


def test_the_whole_study_takes_at_most_eight_hours_beside_an_hour_of_quantizers():
    assert sum(part.minutes for part in parts(Path("outputs/study"))) <= 7 * 60


def test_what_is_typed_replaces_what_the_study_says():
    [sweep] = next(part for part in parts(Path("study"), ["trainer.max_epochs=1"]) if part.name == "runtimes").sweeps
    assert [word for word in sweep.overrides if "max_epochs" in word] == ["trainer.max_epochs=1"]


def row(quantizer, bits, accuracy):
    row = dict.fromkeys(("sparsity", "ratio", "latency_ms", "latency_32_ms"), 1)
    row |= dict.fromkeys(("levels", "first_last_bits", "runtime_agreement", "logit_difference"))
    row |= {"validation_accuracy": accuracy, "test_accuracy": accuracy, "agreement": 1.0, "bytes": 1000 * bits}
    return row | {
        "quantizer": quantizer,
        "bits": bits,
        "levels": 0,
        "activation_bits": 32,
        "runtime": "torch",
        "file": f"{quantizer}.bin",
    }


def finish(directory, seed, rows):
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("method: {stem: kd}\n")
    images = {"train": 54_000, "validation": 6_000, "test": 10_000}
    record = {"seed": seed, "data": {"name": "FashionMNIST", "images": images}, "tradeoff": rows}
    record |= {"student": {"model": "resnet8", "epochs": 4}, "hardware": {"precision": "bf16-mixed"}}
    (directory / "result.json").write_text(json.dumps(record))


@pytest.fixture
def finished(tmp_path):
    """A part of two methods and two seeds, all of whose runs are there."""
    sweep = Sweep(tmp_path / "kd-1", ("student=resnet8", "method=kd,qat", "seed=0,1"))
    for number, accuracy in enumerate((0.5, 0.75)):
        finish(sweep.directory / str(number), number, [row("none", 32, accuracy)])
        finish(sweep.directory / str(2 + number), number, [row("none", 32, 0.125), row("lsq", 4, accuracy / 2)])
    content = {"hydra": [], "jobs": [list(job) for job in sweep.typed]}
    (sweep.directory / "sweep.yaml").write_text(yaml.safe_dump(content))
    return Part("kd", "Two methods", "One beside the other.", 10, (sweep,))


def test_the_page_has_means_and_deviations_the_budget_and_the_commands(finished):
    text = page([finished], "resnet20\n\n| a |\n|---|\n| 1 |\n")
    assert table(text) == [
        ["run", "variant", "val %", "test %", "size kB", "smaller"],
        ["`method=kd`", "fp32", "62.50 ± 17.68", "62.50 ± 17.68", "32.0", "1.0x"],
        # The float weights behind a grid are no result.
        ["`method=qat`", "lsq 4 bit", "31.25 ± 8.84", "31.25 ± 8.84", "4.0", "1.0x"],
    ]
    said = " ".join(text.split())
    assert "54,000 images to train on, 6,000 to validate on, 10,000 to test on." in said
    assert "In every line: epochs 4, precision bf16-mixed, seeds 2." in said
    command = re.search(r"^    (python (?:.*\\\n)*.*)", text, re.MULTILINE)[1].replace("\\\n", "")
    assert " ".join(command.split()) == finished.sweeps[0].command
    assert text.endswith("\n\n    make quantizer-study\n\nresnet20\n\n| a |\n|---|\n| 1 |\n")
    assert "A ResNet-20 of 4 epochs and a ResNet-8x4 of 3" in text.split("## Quantizers and rates")[1]
    assert "left out" not in text


def test_the_page_explains_a_speed(tmp_path):
    sweep = Sweep(tmp_path / "runtimes-1", ("seed=0",))
    rows = [row("none", 32, 0.5), *(row(*each, 0.5) | {"runtime": "openvino"} for each in (("none", 32), ("gpfq", 8)))]
    rows[-1]["speedup"] = 0.5
    finish(sweep.directory / "0", 0, rows)
    (sweep.directory / "sweep.yaml").write_text(yaml.safe_dump({"hydra": [], "jobs": [["seed=0"]]}))
    text = page([Part("runtimes", "A runtime", "Integers.", 10, (sweep,))], None)
    assert [line[-1] for line in table(text)] == ["speed", "", "", "0.5x!"]
    said = " ".join(text.split())
    assert "speed: latency of fp32 in the same runtime over its own, for an image; !: slower." in said


def test_what_the_page_says_of_the_quantizers_networks_is_what_make_trains():
    [job] = compose_jobs(["experiment=fashion_mnist_resnet20"])
    wide = re.search(r"student=resnet8x4 trainer.max_epochs=(\d+)", (SCRIPT.parents[1] / "Makefile").read_text())[1]
    networks = f"A ResNet-20 of {job.config.trainer.max_epochs} epochs and a ResNet-8x4 of {wide}"
    assert QUANTIZERS.startswith(f"{networks}, each quantized with {IMAGES} images. ")


def test_a_part_that_is_not_finished_is_left_out_of_the_page_and_named(finished):
    other = Part("other", "Another part", "", 1, (Sweep(finished.sweeps[0].directory / "none", ("seed=0",)),))
    text = page([finished, other], None)
    assert "Not finished, and left out: Another part." in text
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == ["Two methods"]
    (finished.sweeps[0].directory / "3" / "result.json").unlink()
    assert not finished.finished


def test_a_directory_with_another_sweep_is_refused(finished):
    other = Sweep(finished.sweeps[0].directory, ("student=resnet8", "method=kd,qat", "seed=0,2"))
    with pytest.raises(UserError, match=r"kd-1: found a sweep of other jobs than those of .*; accepted: "):
        other.begun()


@pytest.fixture
def study(tmp_path, monkeypatch, capsys):
    """A function that types a command line, and gives the exit code and what was said."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["study.py", "study", *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.mark.slow
@pytest.mark.fashion_mnist
@pytest.mark.skipif(not FASHION_MNIST.exists(), reason=f"no Fashion-MNIST in {FASHION_MNIST}")
def test_the_study_runs_on_a_slice_and_goes_on_where_it_was(study, tmp_path):
    options = [f"data.root={FASHION_MNIST}", "data.limit=600", "data.image_size=8", "trainer.max_epochs=1"]
    taught = [*options, "student=resnet8", "--seeds", "2", "--parts", "students"]
    code, said, _ = study("--dry-run", *taught)
    assert (code, said.count("python scripts/run.py -m experiment=")) == (0, 2)
    assert not Path("study").exists()

    code, said, problems = study(*options, "--seeds", "2", "--parts", "teachers")
    assert code == 0, problems
    assert said.count("python scripts/run.py -m experiment=") == 2
    code, said, problems = study(*taught)
    assert code == 0, problems
    text = Path("study/study.md").read_text()
    given = "data.limit=600 data.image_size=8 trainer.max_epochs=1 student=resnet8"
    assert f"both with `OVERRIDES='{given}'`" in " ".join(text.split())
    head, *lines = table(text)
    assert [line[0] for line in lines] == ["`method=supervised`", "`method=kd teacher=resnet8x4`"]
    for number, line in enumerate(lines, 1):
        places = [Path("study", f"students-{number}", seed) for seed in "01"]
        records = [json.loads((place / "result.json").read_text()) for place in places]
        accuracies = [100 * record["tradeoff"][0]["test_accuracy"] for record in records]
        mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
        assert line[head.index("test %")] == f"{mean:.2f} ± {deviation:.2f}"
    # Each of the two seeds has its own teacher, the last record being that of kd.
    teachers = [record["teacher"] for record in records]
    assert [teacher["file"].split("/")[-3:-2] for teacher in teachers] == [["0"], ["1"]]
    assert not any(teacher["trained_in_this_run"] for teacher in teachers)

    result = Path("study/students-2/1/result.json")
    result.unlink()
    code, said, problems = study("--page", "docs/page.md", *taught)
    assert code == 2
    assert problems.splitlines()[-1].startswith("error: study: found no finished part")
    before = {path: path.stat().st_mtime_ns for path in Path("study").glob("*/*/result.json")}
    code, said, problems = study(*taught)
    assert code == 0, problems
    assert said.count("python scripts/run.py -m experiment=") == 1
    assert "1 of 2 jobs are finished" in said
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert Path("study/study.md").read_text() == text
    code, said, _ = study(*taught)
    assert (code, "epoch" in said) == (0, False)

    code, _, problems = study("--page", "page.md", *taught, "pruning")
    assert code == 0
    assert "not finished, and left out of the page: Pruning" in problems
    assert Path("page.md").read_text().replace("Not finished, and left out: Pruning.\n\n", "") == text
