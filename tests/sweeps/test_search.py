"""Searches: the space and what is wrong with it, real small searches, killed ones, and several processes at once."""

import csv
import json
import os
import runpy
import shutil
import signal
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import matplotlib.image
import optuna
import pytest
import yaml
from filelock import FileLock, Timeout
from processes import Script
from waiting import wait_for

from compress.errors import UserError
from compress.pipeline.check import checked_jobs
from compress.report.collect import collect
from compress.sweeps.search import TRIES, _open, _Search, search
from compress.sweeps.space import check_space, read_space

SCRIPT = Path(__file__).parents[2] / "scripts" / "search.py"
SMALL = ["student=resnet8", "method=supervised", "data=digits", "data.limit=200", "trainer.max_epochs=1"]
SMALL += ["quantizer=rtn", "quantizer.calibration_images=32", "trainer.log_every=0"]
SPACE = {
    # Random for one trial, so that the later ones follow from what came out of those before.
    "sampler_options": {"n_startup_trials": 1},
    "space": {
        "optimizer.lr": {"low": "1e-3", "high": 2e-2, "log": True},
        "pruning": ["none", "magnitude"],
        "pruning.sparsity": {"low": 0.3, "high": 0.95, "when": {"pruning": "magnitude"}},
        "quantizer.bits": [[2], [4]],
    },
}
TRIALS = 3


def write(folder, content):
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def journal(directory):
    backend = optuna.storages.journal.JournalFileBackend(str(directory / "journal.log"))
    return optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(backend)).trials


def start(space, directory, *options, group=False):
    return Script(SCRIPT, space, directory, *options, *SMALL, folder=space.parent, group=group)


def has_stopped(group):
    """Whether every process of a group has come to its stop."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, found = path.read_text().rpartition(") ")[2].split()[:3]
            if int(found) == group and state not in "TZ":
                return False
    return True


def stopped_within_a_trial(process, directory):
    """Stops the processes of a search; not, that is, while one of them keeps the others from the journal."""
    if not any(directory.glob("trials/*/started.json")):
        return False
    os.killpg(process.pid, signal.SIGSTOP)
    wait_for(lambda: has_stopped(process.pid))
    with suppress(Timeout), ExitStack() as free:
        for name in ("search.lock", "journal.lock"):
            free.enter_context(FileLock(directory / name).acquire(blocking=False))
        if any(directory.glob("trials/*/started.json")):
            return True
    os.killpg(process.pid, signal.SIGCONT)
    return False


def records(directory):
    runs = sorted((directory / "trials").iterdir(), key=lambda run: int(run.name))
    return {int(run.name): json.loads((run / "result.json").read_text()) for run in runs}


def assert_no_trial_is_lost_or_doubled(directory, count):
    trials = journal(directory)
    assert [trial.number for trial in trials] == list(range(len(trials)))
    finished = [trial for trial in trials if trial.state.name == "COMPLETE"]
    assert sorted(trial.user_attrs["run"] for trial in finished) == list(range(count))
    found = records(directory)
    assert list(found) == list(range(count))
    for trial in finished:
        overrides = found[trial.user_attrs["run"]]["overrides"]
        assert overrides == SMALL + [f"{key}={value}" for key, value in trial.params.items()]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search of TRIALS trials in one go: the file of its space, and its directory."""
    folder = tmp_path_factory.mktemp("search")
    path = write(folder, SPACE)
    found = search(read_space(str(path), SMALL), folder / "whole", TRIALS)
    assert (found.finished, found.refused, found.broken, found.unfinished) == (TRIALS, {}, {}, 0)
    return path, folder / "whole"


@pytest.mark.slow
def test_the_pareto_set_is_that_of_validation_accuracy_and_bytes_of_every_variant(searched):
    _, directory = searched
    points = [(number, row) for number, each in records(directory).items() for row in each["tradeoff"]]
    assert len(points) == 2 * TRIALS

    def beats(one, other):
        better = (one["validation_accuracy"], -one["bytes"]), (other["validation_accuracy"], -other["bytes"])
        return better[0] != better[1] and all(a >= b for a, b in zip(*better, strict=True))

    best = [(number, row) for number, row in points if not any(beats(other, row) for _, other in points)]
    with (directory / "pareto.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert {(int(line["bytes"]), float(line["validation_accuracy"])) for line in lines} == {
        (row["bytes"], float(f"{row['validation_accuracy']:.6g}")) for _, row in best
    }
    for line in lines:
        row = next(row for number, row in best if f"trials/{number}/{row['file']}" == line["file"])
        assert (directory / line["file"]).stat().st_size == int(line["bytes"])
        assert float(line["test_accuracy"]) == pytest.approx(row["test_accuracy"], abs=1e-6)
        assert line["overrides"].startswith(" ".join(SMALL))
    picture = matplotlib.image.imread(directory / "pareto.png")
    assert picture.shape[0] > 500
    assert picture[..., :3].std() > 0.05
    assert len(collect([directory]).runs) == TRIALS


@pytest.mark.slow
def test_the_sampler_is_told_validation_accuracy_and_bytes_of_the_quantized_file(searched):
    _, directory = searched
    found = records(directory)
    for trial in journal(directory):
        [_, row] = found[trial.user_attrs["run"]]["tradeoff"]
        assert trial.values == [row["validation_accuracy"], row["bytes"]]
        assert row["bits"] == json.loads(trial.params["quantizer.bits"])[0]
        assert 1e-3 <= trial.params["optimizer.lr"] <= 2e-2
        assert ("pruning.sparsity" in trial.params) == (trial.params["pruning"] == "magnitude")


@pytest.mark.slow
def test_a_killed_search_goes_on_as_if_nothing_had_been(searched, tmp_path):
    path, whole = searched
    directory = tmp_path / "whole"  # the title of the picture has its name
    process = start(path, directory, "--trials", TRIALS)
    wait_for((directory / "trials" / "1" / "checkpoints").exists, process.poll)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (directory / "trials" / "1" / "result.json").exists()
    with (directory / "journal.log").open("ab") as stream:
        stream.write(b'{"op_code":8,"worker_id":"kil')  # as if it had been killed while it wrote this
    found = search(read_space(str(path), SMALL), directory, TRIALS)
    assert (found.finished, found.unfinished) == (TRIALS, 0)
    assert_no_trial_is_lost_or_doubled(directory, TRIALS)
    trials = journal(directory)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", *["COMPLETE"] * (TRIALS - 1)]
    assert trials[2].user_attrs == {"run": 1, "continues": 1, "tries": 2}
    assert trials[2].params == trials[1].params
    for name in ("pareto.csv", "pareto.png"):
        assert (directory / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_an_interrupt_is_said_in_one_line_and_leaves_the_trial_to_the_next_start(searched, tmp_path):
    path, _ = searched
    process = start(path, tmp_path / "search", "--trials", 1)
    wait_for((tmp_path / "search" / "trials" / "0" / "checkpoints").exists, process.poll)
    process.send_signal(signal.SIGINT)
    said = process.said()[1]
    assert process.wait() == 130
    assert said.splitlines()[-1] == "stopped by SIGINT; the same command goes on"
    assert "Traceback" not in said
    assert [trial.state.name for trial in journal(tmp_path / "search")] == ["RUNNING"]


@pytest.mark.slow
def test_a_finished_search_goes_on_to_more_trials_and_refuses_to_be_another(searched, tmp_path):
    path, whole = searched
    directory = shutil.copytree(whole, tmp_path / "whole")
    before = {run: (directory / "trials" / str(run) / "result.json").stat().st_mtime_ns for run in range(TRIALS)}
    assert search(read_space(str(path), SMALL), directory, TRIALS).finished == TRIALS
    assert search(read_space(str(path), SMALL), directory, TRIALS + 1).finished == TRIALS + 1
    assert_no_trial_is_lost_or_doubled(directory, TRIALS + 1)
    assert before == {run: (directory / "trials" / str(run) / "result.json").stat().st_mtime_ns for run in before}
    with pytest.raises(UserError, match=r"overrides: found \[.*'seed=1'\], but \[.* in .*search\.json"):
        search(read_space(str(path), [*SMALL, "seed=1"]), directory, TRIALS + 2)
    changed = SPACE | {"space": SPACE["space"] | {"quantizer.bits": [[2], [8]]}}
    with pytest.raises(UserError, match=r"dimensions\.quantizer\.bits\.choices: found .*8.*, but .*4"):
        search(read_space(str(write(tmp_path, changed)), SMALL), directory, TRIALS + 2)
    assert len(journal(directory)) == TRIALS + 1


@pytest.mark.slow
def test_processes_share_a_search_and_take_over_from_one_that_was_killed(tmp_path):
    path = write(tmp_path, SPACE | {"sampler": "nsga2", "sampler_options": {"population_size": 2}})
    directory, count = tmp_path / "search", 3
    killed = start(path, directory, "--trials", count, "--processes", 2, group=True)
    wait_for(lambda: stopped_within_a_trial(killed, directory), killed.poll)
    beside = start(path, directory, "--trials", count)
    try:
        # What is only stopped keeps its trials.
        wait_for(lambda: any(directory.glob("trials/*/result.json")), beside.poll)
        assert not any(trial.state.name == "FAIL" for trial in journal(directory))
        os.kill(killed.pid, signal.SIGKILL)  # the parent of two, which have to end as well
        os.killpg(killed.pid, signal.SIGCONT)
        assert beside.wait() == 0, beside.said()
    finally:
        beside.kill()
        beside.wait()
        killed.wait()
    # The one beside it may have been done before the two had ended.
    assert search(read_space(str(path), SMALL), directory, count).finished == count
    assert_no_trial_is_lost_or_doubled(directory, count)
    killed_trials = [trial for trial in journal(directory) if trial.state.name != "COMPLETE"]
    assert 1 <= len(killed_trials) <= 2
    assert all(trial.state.name == "FAIL" for trial in killed_trials)


@pytest.mark.slow
def test_a_combination_that_cannot_be_is_left_out_with_its_reason(tmp_path):
    space = {"overrides": ["optimizer=sgd"], "seed": 4}
    space["space"] = {"optimizer.nesterov": [True, False], "optimizer.momentum": [0.9, 0]}
    path = write(tmp_path, space)
    found = search(read_space(str(path), SMALL), tmp_path / "search", 2)
    assert (found.finished, len(found.refused)) == (1, 1)
    for trial in journal(tmp_path / "search"):
        refused = trial.user_attrs["run"] in found.refused
        assert refused == (trial.params == {"optimizer.nesterov": "true", "optimizer.momentum": "0"})
        assert trial.state.name == ("PRUNED" if refused else "COMPLETE")
        assert (tmp_path / "search" / "trials" / str(trial.user_attrs["run"])).exists() != refused
    assert all(reason.startswith("optimizer: ") for reason in found.refused.values())

    # What is no mistake of the user has its traceback, and the search goes on as well.
    (tmp_path / "search" / "trials" / "2").write_text("in the way")
    done = start(path, tmp_path / "search", "--trials", 3)
    said = done.said()[1]
    assert done.wait() == 1
    assert "Traceback" in said
    assert "warning: trial 2 failed: FileExistsError: " in said
    assert "note: trial 1 could not be run: optimizer: " in said


@pytest.mark.slow
def test_a_trial_that_always_ends_its_process_is_given_up(tmp_path):
    space = read_space(str(write(tmp_path, SPACE)), SMALL)
    for _ in range(TRIES):
        own = _Search(space, tmp_path)
        with ExitStack() as held:
            trial, values = own.next(1, held)
            held.pop_all().close()  # what the end of a process does to its locks
        assert trial.user_attrs["run"] == 0
    assert _Search(space, tmp_path).next(1, ExitStack()) is None
    assert len({json.dumps(trial.params) for trial in journal(tmp_path)}) == 1
    assert {trial.state.name for trial in journal(tmp_path)} == {"FAIL"}
    checked_jobs(space.overrides_of(values))


MISTAKES = {
    "no such file": ("nowhere.yaml", ["space:", "'nowhere.yaml'", "quickstart"]),
    "no YAML": ("{", ["cannot be read as YAML"]),
    "a list": ("[1]", ["space.yaml: found [1]", "a mapping"]),
    "no space": ("seed: 1", ["space:", "found none"]),
    "empty": ("space: {}", ["space:", "1 element"]),
    "unknown entry": ("spaces: {}", ["yaml: spaces:", "sampler_options"]),
    "sampler": ("{sampler: grid, space: {seed: [0, 1]}}", ["sampler:", "'grid'", "tpe, nsga2"]),
    "option of the sampler": (
        "{sampler_options: {population: 3}, space: {seed: [0, 1]}}",
        ["sampler_options.population:", "n_startup_trials"],
    ),
    "value of the sampler": (
        "{sampler: nsga2, sampler_options: {population_size: 1}, space: {seed: [0, 1]}}",
        ["sampler_options.population_size:", "1", "at least 2"],
    ),
    "empty list": ("space: {scheduler: []}", ["space.scheduler.choices:", "at least 1"]),
    "twice": ("space: {seed: [1, 1]}", ["space.seed:", "every value once"]),
    "a word": ("space: {scheduler: cosine}", ["space.scheduler:", "a list of values"]),
    "a mapping as value": ("space: {scheduler: [{a: 1}]}", ["space.scheduler:", "{'a': 1}"]),
    "low above high": ("space: {optimizer.lr: {low: 1, high: 0.1}}", ["space.optimizer.lr:", "low 1", "below"]),
    "low alone": ("space: {optimizer.lr: {low: 1}}", ["space.optimizer.lr.high:", "found none"]),
    "log of zero": ("space: {optimizer.lr: {low: 0, high: 1, log: true}}", ["space.optimizer.lr.low:", "greater"]),
    "half": ("space: {seed: {low: 0.5, high: 2, type: int}}", ["space.seed.low:", "a whole number"]),
    "entry of a range": ("space: {seed: {low: 0, hi: 2}}", ["space.seed.hi:", "low, high, log, type, when"]),
    "beside it": ("space: {student: [resnet8, resnet20]}", ["space.student:", "'student=resnet8'"]),
    "not searched": ("space: {output_directory: [a, b]}", ["space.output_directory:", "cannot be searched"]),
    "when": ("space: {optimizer.lr: {low: 1, high: 2, when: {loss: kd}}}", ["space.optimizer.lr.when.loss:", "none"]),
    "when it is what": (
        "space: {pruning: [none, nm], pruning.n: {choices: [1, 2], when: {pruning: magnitude}}}",
        ["space.pruning.n.when.pruning:", "magnitude", "none, nm"],
    ),
    "unknown key": ("space: {optimizer.lrr: [0.1]}", ["space.optimizer.lrr:", "optimizer.lrr: found an unknown key"]),
    "unknown option": ("space: {pruning: [none, half]}", ["space.pruning:", "'half'", "magnitude"]),
    "value": ("space: {optimizer.lr: [0.1, -1]}", ["space.optimizer.lr:", "-1", "greater than 0"]),
    "end of a range": ("space: {pruning: [magnitude], pruning.sparsity: {low: 0.5, high: 1.5}}", ["1.5", "less than"]),
    "no whole number": ("space: {trainer.warmup: {low: 1, high: 2}}", ["space.trainer.warmup:", "unknown key"]),
    "several machines": (
        "overrides: [trainer=ddp_cpu, trainer.devices=1, trainer.num_nodes=2]\nspace: {optimizer.lr: [0.1]}",
        ["trainer.num_nodes: found 2 for a search; accepted: 1"],
    ),
    "minimize": ("{minimize: macs, space: {seed: [0, 1]}}", ["minimize:", "'macs'", "bytes, latency"]),
    "latency without a runtime": ("{minimize: latency, space: {seed: [0, 1]}}", ["export:", "no runtime", "onnx"]),
    "whole numbers": ("space: {data.batch_size: {low: 8, high: 64}}", ["space.data.batch_size:", "has type: int"]),
}


@pytest.mark.slow
def test_a_search_for_latencies_goes_by_those_of_the_runtime(tmp_path):
    path = write(tmp_path, {"minimize": "latency", "space": {"quantizer.first_last_bits": [8, 4]}})
    integers = [*SMALL, "export=onnx", "quantizer.bits=[8]", "quantizer.activation_bits=8"]
    space, directory = read_space(str(path), integers), tmp_path / "search"
    with pytest.raises(UserError, match="processes: found 2, which would slow each other down"):
        search(space, directory, 2, processes=2)
    assert not directory.exists()
    found = search(space, directory, 2)
    rows = [row for each in records(directory).values() for row in each["tradeoff"] if row["runtime"] == "onnxruntime"]
    fastest = min(row["latency_ms"] for row in rows)
    assert found.pareto[0].row.latency_ms == fastest
    latencies = [point.row.latency_ms for point in found.pareto]
    assert latencies == sorted(latencies)
    with (directory / "pareto.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [float(line["latency_ms"]) for line in lines] == pytest.approx(latencies, rel=1e-5)
    assert all(line["file"].endswith(".onnx") for line in lines)
    for trial in journal(directory):
        told = trial.values
        assert told[1] in [row["latency_ms"] for row in rows if row["quantizer"] == "rtn"]


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_the_space_is_one_line_before_any_work(case, tmp_path):
    content, said = MISTAKES[case]
    path = tmp_path / "space.yaml"
    if case == "no such file":
        path = content
    else:
        path.write_text(content)
    with pytest.raises(UserError) as mistake:
        search(read_space(str(path), SMALL), tmp_path / "search", 2)
    for words in said:
        assert words in str(mistake.value)
    assert len(str(mistake.value).splitlines()) == 1
    assert not (tmp_path / "search").exists()


def test_a_foreign_directory_and_no_trials_are_refused(tmp_path):
    space = read_space(str(write(tmp_path, SPACE)), SMALL)
    with pytest.raises(UserError, match=r"output: found .*, which holds something else"):
        search(space, tmp_path, 2)
    assert [each.name for each in tmp_path.iterdir()] == ["space.yaml"]
    for options in ({"trials": 0}, {"trials": 1, "processes": 0}):
        with pytest.raises(UserError, match="found 0; accepted: a whole number of at least 1"):
            search(space, tmp_path / "search", **options)
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "search.json").write_text("{")
    with pytest.raises(UserError, match=r"search\.json: cannot be read"):
        search(space, tmp_path / "search", 2)
    shutil.rmtree(tmp_path / "search")
    assert _open(space, tmp_path / "search") is None
    for content in ('{"op_code": 0}\n', "[1]\n", "x\n", "\n", "\xff\n"):
        (tmp_path / "search" / "journal.log").write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match=r"journal\.log: cannot be read \(.*\); accepted: a journal as Optuna"):
            search(space, tmp_path / "search", 2)


@pytest.mark.slow
def test_values_are_checked_where_they_go_together(tmp_path):
    # The first method takes none of the losses, and the second of them no alpha.
    content = {
        "method": ["supervised", "kd"],
        "loss": {"choices": ["kd", "dkd"], "when": {"method": ["kd"]}},
        "loss.temperature": {"low": 1, "high": 8, "log": True, "when": {"loss": ["kd", "dkd"]}},
        "loss.alpha": {"low": 0, "high": 1, "when": {"loss": "kd"}},
    }
    overrides = ["experiment=quickstart", "data.limit=200"]
    space = read_space(str(write(tmp_path, {"overrides": overrides, "space": content})))
    check_space(space)
    assert [key for key in space.dimensions if space.applies(key, {"method": "kd", "loss": "dkd"})] == list(content)[:3]


@pytest.mark.slow
def test_the_search_that_comes_along_can_be_composed():
    check_space(read_space("quickstart"))


@pytest.mark.slow
def test_the_script_says_in_one_line_what_is_wrong_and_which_extra_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr(sys, "argv", list(map(str, [SCRIPT, write(tmp_path, SPACE), tmp_path / "search", *SMALL])))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert said.err == "error: search: Optuna is not installed; pip install 'compress[search]'\n"
    assert not (tmp_path / "search").exists()
    helping = Script(SCRIPT, "--help", folder=tmp_path)
    assert "--processes" in helping.said()[0]
    assert helping.wait() == 0
