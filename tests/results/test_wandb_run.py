"""What a run leaves at W&B: real offline runs, read back from the records in their files."""

import base64
import csv
import hashlib
import json
import signal
from pathlib import Path

import pytest
import wandb
import yaml
from processes import Script
from waiting import wait_for
from wandb.proto.wandb_internal_pb2 import Record

import compress
from compress.cli import main
from compress.config.compose import compose_jobs
from compress.methods.supervised import Supervised
from compress.paths import PACKAGE
from compress.pipeline.check import checked_jobs
from compress.results.loggers import open_loggers
from compress.results.wandb_run import WandbRun
from compress.stopping import StoppedError
from compress.training import distributed

pytestmark = pytest.mark.slow

SCRIPT = PACKAGE.parent / "scripts" / "run.py"
OPTIONS = [
    "method=supervised",
    "student=resnet8",
    "trainer.max_epochs=2",
    "data.limit=200",
    "quantizer=rtn",
    "quantizer.bits=[8,2]",
    "quantizer.calibration_images=64",
    "logger=[csv,wandb]",
    "logger.wandb.offline=true",
    "logger.wandb.project=digits",
    "logger.wandb.entity=team",
    "logger.wandb.tags=[first,small]",
    "logger.wandb.notes=what for",
]


class Read:
    """A run as its `.wandb` file has it: a log of blocks of 32 KiB, as in LevelDB, of W&B's protobuf records."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self.config, self.summary, self.history, self.artifacts, self.exit_code = {}, {}, {}, {}, None
        for record in self._records(path.read_bytes()):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                _update(self.config, record.run.config.update)
            elif kind in ("config", "summary"):
                _update(getattr(self, kind), getattr(record, kind).update)
            elif kind == "history":
                _update(self.history.setdefault(record.history.step.num, {}), record.history.item)
            elif kind == "artifact":
                self.artifacts[record.artifact.name] = record.artifact
            elif kind == "exit":
                self.exit_code = record.exit.exit_code

    @staticmethod
    def _records(content: bytes):
        assert content[:4] == b":W&B"
        at, fragments = 7, b""
        while at + 7 <= len(content):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
            if at + 7 + length > len(content):
                return  # being written
            fragments += content[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # in one piece, or the last of several
                yield Record.FromString(fragments)
                fragments = b""


def _update(content: dict, items) -> None:
    for item in items:
        *parents, last = item.nested_key or [item.key]
        node = content
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = json.loads(item.value_json)


def read_now(directory: Path) -> list[Read]:
    """The W&B runs of one run directory as far as they are written, the earliest first."""
    return [Read(path) for path in sorted(directory.glob("wandb/offline-run-*/*.wandb"))]


def read_all(directory: Path) -> list[Read]:
    """The W&B runs of one run directory, all of them ended, the earliest first."""
    # W&B's own process may be about to write the end.
    wait_for(lambda: all(run.exit_code is not None for run in read_now(directory)))
    return read_now(directory)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The directory of a finished sweep of two jobs."""
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WANDB_DATA_DIR", str(folder / "data"))
        process = Script(SCRIPT, "-m", *OPTIONS, "seed=0,1", folder=folder)
    assert process.wait() == 0, process.said()
    [directory] = (folder / "outputs" / "sweeps").iterdir()
    return directory


@pytest.fixture(scope="module")
def first(sweep):
    """The first job's directory, its W&B run and its `result.json`."""
    [read] = read_all(sweep / "0")
    return sweep / "0", read, json.loads((sweep / "0" / "result.json").read_text())


def test_each_job_of_a_sweep_is_a_finished_run_in_the_group_of_the_sweep(sweep):
    runs = [read_all(sweep / number) for number in ("0", "1")]
    assert [len(reads) for reads in runs] == [1, 1]
    [one], [other] = runs
    assert one.run.run_id != other.run.run_id
    for number, read in enumerate((one, other)):
        assert read.run.run_group == sweep.name
        assert read.run.job_type == "supervised"
        assert read.run.display_name == f"supervised resnet8 digits seed {number} ({number})"
        assert (read.run.project, read.run.entity, read.run.notes) == ("digits", "team", "what for")
        assert list(read.run.tags) == ["first", "small"]
        assert read.exit_code == 0
        assert json.loads((sweep / str(number) / "wandb.json").read_text())["id"] == read.run.run_id


def test_the_configuration_is_the_composed_one_with_the_commit_and_the_directory(first):
    directory, read, record = first
    config = dict(read.config)
    commit = record["versions"]["commit"]
    assert config.pop("commit") == commit
    assert read.run.git.commit == (commit or "").removesuffix("-dirty")
    assert config.pop("directory") == str(directory)
    config.pop("_wandb")
    assert config == yaml.safe_load((directory / "config.yaml").read_text())


def test_every_metric_is_there_at_its_step(first):
    directory, read, _ = first
    with (directory / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 3
    for row in rows:
        del row["crc32"]
        logged = read.history[int(row.pop("step"))]
        expected = {key: float(value) for key, value in row.items() if value}
        assert {key: logged[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert {"train/loss", "val/accuracy", "train/learning_rate"} <= read.history[int(min(read.history))].keys()


def test_the_trade_off_is_a_table_and_accuracy_against_bytes_a_scatter(first):
    _, read, record = first
    last = read.history[max(read.history)]
    content = (read.folder / "files" / last["tradeoff"]["path"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == last["tradeoff"]["sha256"]
    table = json.loads(content)
    rows = [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]
    assert [row.pop("variant") for row in rows] == ["fp32", "rtn 8 bit", "rtn 2 bit"]
    assert rows == record["tradeoff"]
    chart = read.config["_wandb"]["visualize"]["accuracy_against_bytes"]["panel_config"]
    assert chart["panelDefId"] == "wandb/scatter/v0"
    assert chart["fieldSettings"] == {"x": "bytes", "y": "test_accuracy"}
    assert last["accuracy_against_bytes_table"]["sha256"] == last["tradeoff"]["sha256"]


def test_the_pictures_of_the_run_are_there(first):
    directory, read, _ = first
    last = read.history[max(read.history)]
    for name in ("tradeoff", "layers", "weights"):
        shown = last[f"pictures/{name}"]
        assert shown["_type"] == "image-file"
        assert (read.folder / "files" / shown["path"]).read_bytes() == (directory / f"{name}.png").read_bytes()


def test_the_model_files_are_artifacts_with_the_figures_of_their_rows(first):
    directory, read, record = first
    models = {name: artifact for name, artifact in read.artifacts.items() if artifact.type == "model"}
    assert len(models) == len(record["tradeoff"]) == 3
    for row in record["tradeoff"]:
        path = directory / row["file"]
        artifact = models[f"{path.name}-{read.run.run_id}"]
        [entry] = artifact.manifest.contents
        assert (entry.path, entry.size, entry.local_path) == (path.name, row["bytes"], str(path))
        assert entry.digest == base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode()
        assert json.loads(artifact.metadata) == row


def test_the_summary_has_the_figures_to_sort_by(first):
    _, read, record = first
    fp32, eight, two = record["tradeoff"]
    summary = read.summary
    assert summary["test_accuracy"] == record["student"]["test_accuracy"]
    assert summary["macs"] == record["student"]["macs"]
    assert summary["seconds"] == pytest.approx(sum(record["seconds"].values()))
    for name, row in (("fp32", fp32), ("rtn_8_bit", eight), ("rtn_2_bit", two)):
        for key in ("bytes", "test_accuracy", "validation_accuracy", "ratio", "sparsity", "macs", "latency_ms"):
            assert summary[f"tradeoff/{name}/{key}"] == pytest.approx(row[key])
    names = {"fp32": fp32, "rtn 8 bit": eight, "rtn 2 bit": two}
    densest = names[summary["per_byte/variant"]]
    assert all(
        densest["validation_accuracy"] / densest["bytes"] >= r["validation_accuracy"] / r["bytes"]
        for r in names.values()
    )
    assert summary["per_byte/points_per_kb"] == pytest.approx(
        100 * densest["test_accuracy"] / (densest["bytes"] / 1000)
    )
    smallest = names[summary["smallest/variant"]]
    good = [row for row in names.values() if row["validation_accuracy"] >= fp32["validation_accuracy"] - 0.01]
    assert smallest["bytes"] == summary["smallest/bytes"] == min(row["bytes"] for row in good)


def test_a_run_that_failed_says_so_and_goes_on_as_the_same_run_when_it_is_resumed(monkeypatch, tmp_path):
    started = Supervised.on_train_epoch_start

    def fail(module):
        started(module)
        if module.current_epoch == 1:
            # What a kill -9 would leave now: the epoch that a checkpoint has is in the file as well.
            directory = Path(module.trainer.loggers[1].save_dir)
            wait_for(lambda: [run for run in read_now(directory) if run.history])
            held = read_now(directory)[0].history
            assert {"train/loss", "val/accuracy"} <= held[max(held)].keys()
            raise RuntimeError("lost")

    typed = [*OPTIONS, "quantizer.bits=[2]", "logger.wandb.log_models=false"]
    # The run of a caller in the same process is not ours to take.
    with wandb.init(mode="offline", dir=tmp_path) as callers:
        with monkeypatch.context() as patch:
            patch.setattr(Supervised, "on_train_epoch_start", fail)
            with pytest.raises(RuntimeError, match="lost"):
                compress.run(typed)
        [directory] = Path("outputs/runs").iterdir()
        assert main([f"resume={directory}", "logger.wandb.notes=resumed"]) == 0
    failed, resumed = read_all(directory)
    assert failed.run.run_id == resumed.run.run_id != callers.id
    assert (failed.exit_code, resumed.exit_code) == (1, 0)
    assert resumed.run.notes == "resumed"
    assert failed.run.run_group == ""
    assert failed.run.display_name == resumed.run.display_name == "supervised resnet8 digits seed 0"
    # One epoch each, and no step twice.
    assert max(failed.history) < min(resumed.history)
    assert "val/accuracy" in failed.history[max(failed.history)]
    assert "test_accuracy" not in failed.summary
    assert 0 <= resumed.summary["test_accuracy"] <= 1
    assert [artifact.type for artifact in resumed.artifacts.values()] == ["run_table"]


def test_a_run_in_several_processes_that_failed_says_so(monkeypatch, tmp_path):
    def fail(*arguments):
        raise RuntimeError("lost")

    monkeypatch.setattr(distributed, "train", fail)
    with pytest.raises(RuntimeError, match="lost"):
        compress.run([*OPTIONS, "trainer=ddp_cpu", "data.batch_size=32"])
    [directory] = Path("outputs/runs").iterdir()
    [read] = read_all(directory)
    assert read.exit_code == 1


def test_a_run_is_finished_only_after_it_was_uploaded(monkeypatch, tmp_path):
    end = WandbRun.end

    def stop(logger, exit_code):
        end(logger, exit_code)
        raise StoppedError(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(WandbRun, "end", stop)
        with pytest.raises(StoppedError):
            compress.run([*OPTIONS, "trainer.max_epochs=1"])
    [directory] = Path("outputs/runs").iterdir()
    assert not (directory / "result.json").exists()
    assert main([f"resume={directory}"]) == 0
    assert [read.exit_code for read in read_all(directory)] == [0, 0]


def test_a_run_that_was_interrupted_is_ended_too(tmp_path):
    composed = checked_jobs([*OPTIONS, "logger.wandb.name=mine", "logger.wandb.group=g"])[0].config
    with pytest.raises(KeyboardInterrupt), open_loggers(composed, tmp_path):
        raise KeyboardInterrupt
    [read] = read_all(tmp_path)
    assert read.exit_code == 255
    assert (read.run.display_name, read.run.run_group, read.run.job_type) == ("mine", "g", "supervised")


def test_variants_of_a_method_have_a_job_type_each(tmp_path):
    typed = [*OPTIONS, "method=supervised_mixup"]
    composed = checked_jobs(typed)[0].config
    with open_loggers(composed, tmp_path):
        pass
    [read] = read_all(tmp_path)
    assert read.run.job_type == "supervised_mixup"
    assert read.exit_code == 0


def test_a_key_that_wandb_refuses_ends_the_run_before_anything_is_built(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    typed = [option for option in OPTIONS if not option.startswith("logger.")]
    with pytest.raises(compress.errors.UserError, match=r"^logger\.wandb: .*key.*offline=true"):
        compress.run(typed)
    assert "epoch" not in capsys.readouterr().out
    assert not list(Path("outputs").rglob("*.ckpt"))


def test_several_loggers_can_be_chosen_at_once():
    for typed, expected in {
        "logger=wandb": {"csv", "wandb"},
        "logger=[wandb,tensorboard]": {"csv", "wandb", "tensorboard"},
        "logger=[csv,tensorboard]": {"csv", "tensorboard"},
    }.items():
        composed = compose_jobs([typed])[0].config
        assert set(composed.logger) == expected
