"""Every way from a file that somebody sent to a constructor, each tried with code that leaves a mark: none is left."""

import copy
import json
import runpy
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import compress
from compress import models
from compress.benchmarks.quantizer_study import measure
from compress.cli import main
from compress.config.compose import compose_jobs
from compress.config.received import allowed_targets, check_content, check_overrides
from compress.config.recorded import read_config, write_config
from compress.config.values import check_values
from compress.errors import UserError
from compress.export.container import read, write
from compress.export.description import NetworkDescription
from compress.export.packed import write_float
from compress.pipeline.parts import Parts

SCRIPTS = Path(__file__).parents[1] / "scripts"
EVIL = """
from pathlib import Path

Path("mark").write_text("imported")


def run(*values, **keys):
    Path("mark").write_text("called")
"""
OWN = """
from compress.losses.cross_entropy import CrossEntropy


class Mine(CrossEntropy):
    pass
"""
SHORT = [
    "method=supervised",
    "student=resnet8",
    "data.limit=150",
    "trainer.max_epochs=1",
    "trainer.log_every=0",
    "trainer.accelerator=cpu",
    "quantizer=none",
]
TARGET = {"_target_": "evil.run", "command": "touch mark"}
HINT = "accepted, if you trust it: allow_targets=[evil.run] on the command line, or --config-dir DIR with others"
# Where a configuration names code, and the overrides that bring it there.
PLACES = {
    "data": [],
    "student": [],
    "peer": ["peer=resnet8", "method=dml"],
    "teacher.model": ["teacher=resnet8", "method=kd"],
    "teacher.training.optimizer": ["teacher=resnet8", "method=kd"],
    "teacher.training.scheduler": ["teacher=resnet8", "method=kd"],
    "teacher.members.0.model": ["teacher=ensemble", "teacher.members=[resnet8,resnet20]", "method=kd"],
    "mixup": ["mixup=images"],
    "pruning": ["pruning=magnitude"],
    "loss": [],
    "quantizer": ["quantizer=gpfq"],
    "quantizer.solver": ["quantizer=gpfq"],
    "export.packed": [],
    "export.mine": [],
    "method": [],
    "optimizer": [],
    "optimizer.betas": [],
    "scheduler": [],
    "trainer": [],
    "trainer.plugins": [],
    "logger.csv": [],
    "logger.csv.mine": [],
    "seed": [],
    "hydra.callbacks.mine": [],
}
RESOLVED = [
    "${oc.env:SECRET}",
    "a ${oc.env:SECRET,none} b",
    "${oc.decode:'{_target_: evil.run}'}",
    "${oc.create:${output_directory}}",
    "${when:true,{_target_: evil.run},0}",
    "${hydra:runtime.cwd}",
    "${now:%Y}",
    "${${seed}:SECRET}",
    "\\${oc.env:SECRET}",
    "\\${${seed}}",
    "${seed}$",
    "$${seed}",
]
OVERRIDES = [
    "+pruning._target_=evil.run",
    "pruning={_target_: evil.run}",
    "loss={_target_: evil.run, command: touch mark}",
    "++loss._target_='evil.run'",
    "quantizer.solver={_target_: evil.run}",
    "optimizer._target_=evil.run",
    "+teacher={model: {_target_: evil.run}}",
    "student={stem: module, target: evil.run}",
    "student.target=evil.run",
    "loss@student.target=evil.run",
    "teacher.model={target: evil.run, from_python: true}",
    "teacher.model.from_python=false",
    "+sent@optimizer=evil",
    "loss._target_=${student.stem}",
    "loss=../../sent/evil",
    "loss=[../../sent/evil]",
    "experiment=../../sent/evil",
    "+data/options@loss=../../../sent/evil",
    "loss=${oc.env:SECRET}",
    "loss=${student.stem}",
    "output_directory=${oc.env:SECRET}",
    "output_directory='${oc.env:SECRET}'",
    "+hydra.callbacks.mine._target_=evil.run",
    "hydra/launcher=joblib",
    "hydra={callbacks: {mine: {_target_: evil.run}}}",
    "+loss@hydra.callbacks.mine=kd",
    "+loss@_global_.hydra.callbacks.mine=kd",
    "hydra.searchpath=[sent]",
    "seed=1,2",
    "loss=glob(*)",
    "allow_targets=[evil.run]",
    "stages=[{name: one, overrides: ['+pruning._target_=evil.run']}]",
    "stages=[{name: one, overrides: ['loss={_target_: evil.run}']}]",
    "stages=[{name: one, overrides: ['mixup=${output_directory}']}]",
    "stages=${teacher.members}",
    "+stages.0.overrides.0='+pruning._target_=evil.run'",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory from which `evil`, which leaves a mark, and `own` can be imported, and a secret."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SECRET", "mixup")
    Path("evil.py").write_text(EVIL)
    Path("own.py").write_text(OWN)
    yield tmp_path
    for module in ("evil", "own"):
        sys.modules.pop(module, None)


@lru_cache
def composed(*overrides):
    [job] = compose_jobs([*SHORT, *overrides])
    check_values(job.config)
    return job.config


def begun(directory, *overrides):
    """The configuration of a run that was begun in `directory`."""
    config = composed(*overrides)
    write_config(Path(directory), config)
    return OmegaConf.to_container(config)


def put(content, key, value):
    """`content` with `value` at `key`; in a mapping that is there the keys of `value`."""
    *way, last = key.split(".")
    node = content
    for part in way:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    if isinstance(value, dict) and isinstance(node.get(last), dict):
        node[last].update(value)
    else:
        node[last] = value
    return content


def left(directory, content):
    Path(directory).mkdir(parents=True, exist_ok=True)
    Path(directory, "config.yaml").write_text(yaml.safe_dump(content))


def swept(*jobs, hydra=()):
    Path("sent").mkdir(exist_ok=True)
    Path("sent/sweep.yaml").write_text(yaml.safe_dump({"hydra": list(hydra), "jobs": [list(job) for job in jobs]}))


def script(name, *arguments):
    """The exit code of a script in this process."""
    sys.argv, before = [name, *map(str, arguments)], sys.argv
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before
    return ended.value.code


def refused(code, capsys):
    """The one line of what ended with `code`, after which nothing has run."""
    streams = capsys.readouterr()
    assert code == 2, streams.err
    [line] = streams.err.splitlines()
    assert line.startswith("error: ")
    assert not Path("mark").exists()
    assert "evil" not in sys.modules
    return line


@pytest.mark.parametrize("place", PLACES)
def test_a_run_names_no_code_of_its_own(place, folder, capsys):
    left("sent", put(begun("sent", *PLACES[place]), place, TARGET))
    line = refused(main(["resume=sent"]), capsys)
    assert line == (
        f"error: sent/config.yaml: {place}._target_: found 'evil.run', which no option of conf/ names; {HINT}"
    )
    with pytest.raises(UserError, match=r"found 'evil\.run'"):
        compress.run(["resume=sent"])
    # `scripts/quantizer_study.py` reads it too, and needs a result beside it.
    with pytest.raises(UserError, match=r"found 'evil\.run'"):
        measure(Path("sent"), {}, {}, lambda: None)


@pytest.mark.parametrize("place", ["student", "teacher.model", "peer", "method", "student.arguments"])
def test_a_run_names_no_class_of_its_own_either(place, folder, capsys):
    left("sent", put(begun("sent"), place, {"stem": "module", "target": "evil.run"}))
    assert f"sent/config.yaml: {place}.target: found 'evil.run'" in refused(main(["resume=sent"]), capsys)


@pytest.mark.slow
def test_no_value_of_a_run_becomes_code(folder):
    content = begun("sent", "quantizer=gpfq", "mixup=images", "pruning=magnitude", "teacher=resnet8", "method=kd")

    def keys(node, way=()):
        if isinstance(node, dict):
            for key, value in node.items():
                yield from keys(value, (*way, key))
        else:
            yield ".".join(way)

    tried = 0
    for key in keys(content):
        left("sent", put(copy.deepcopy(content), key, "evil.run"))
        try:
            config = read_config(Path("sent"))
            check_values(config)
            Parts(config).build_small()
        except UserError:
            pass
        tried += 1
    assert tried > 60
    assert not Path("mark").exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize("value", RESOLVED)
def test_a_run_has_nothing_looked_up(value, folder, capsys):
    for place in ("output_directory", "data.mean", "loss", "stages"):
        left("sent", put(begun("sent"), place, value))
        line = refused(main(["resume=sent"]), capsys)
        assert line.startswith(f"error: sent/config.yaml: {place}: found ")
    left("sent", put(begun("sent"), "grid", {value: "x"}))
    assert refused(main(["resume=sent"]), capsys).startswith("error: sent/config.yaml: grid.key: found ")


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_override_in_a_file_sets_what_an_option_sets(override, folder, capsys):
    Path("sent").mkdir()
    Path("sent/evil.yaml").write_text(yaml.safe_dump(TARGET))
    swept(SHORT, [*SHORT, override])
    assert refused(main(["sweep=sent"]), capsys).startswith("error: sent/sweep.yaml: ")
    Path("search.yaml").write_text(yaml.safe_dump({"overrides": [*SHORT, override], "space": {"seed": [1, 2]}}))
    assert refused(script("search", "search.yaml", "found"), capsys).startswith("error: search.yaml: ")
    left("staged", put(begun("staged"), "stages", [{"name": "one", "overrides": [override]}]))
    assert refused(main(["resume=staged"]), capsys).startswith("error: staged/config.yaml: ")


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "loss._target_": ["compress.losses.kd.KD", "evil.run"],
        "student.target": ["evil.run"],
        "loss": ["kd", "../../sent/evil"],
        "hydra/launcher": ["joblib"],
        "+loss@hydra.callbacks.mine": ["kd"],
        "output_directory": ["${oc.env:SECRET}"],
    }.items(),
)
def test_a_search_does_not_look_for_code(key, values, folder, capsys):
    Path("search.yaml").write_text(yaml.safe_dump({"overrides": SHORT, "space": {key: values}}))
    assert refused(script("search", "search.yaml", "found"), capsys).startswith("error: search.yaml: ")


def test_the_stages_of_a_run_are_read_like_the_run(folder, capsys):
    stages = [{"name": "one", "overrides": []}, {"name": "two", "overrides": []}]
    left("sent", put(begun("sent"), "stages", stages))
    begun("sent/1-one")
    left("sent/2-two", put(begun("sent/2-two"), "loss", TARGET))
    assert "sent/2-two/config.yaml: loss._target_: found 'evil.run'" in refused(main(["resume=sent"]), capsys)
    # One of the jobs of a sweep in which nothing is wrong with the list of them.
    swept([*SHORT, "stages=[{name: one, overrides: []}, {name: two, overrides: []}]"])
    Path("sent/config.yaml").unlink()
    left("sent/0", put(begun("sent/0"), "stages", stages))
    begun("sent/0/1-one")
    left("sent/0/2-two", put(begun("sent/0/2-two"), "method", TARGET))
    assert "sent/0/2-two/config.yaml: method._target_: found" in refused(main(["sweep=sent"]), capsys)


def test_what_a_sweep_tells_hydra_is_left_out_even_where_the_sweep_is_refused(folder, capsys):
    hydra = ["+hydra.callbacks.mine._target_=evil.run", "hydra/launcher=joblib", "hydra.searchpath=[sent]"]
    swept([*SHORT, "trainer.max_epochs=0"], hydra=hydra)
    assert "trainer.max_epochs" in refused(main(["sweep=sent"]), capsys)


def test_a_run_that_slurm_starts_again_is_one_of_somebody_too(folder, monkeypatch, capsys):
    left("outputs/runs/one", put(begun("outputs/runs/one"), "loss", TARGET))
    started = {"overrides": SHORT, "started": "2026-07-01T09:00:00+02:00", "slurm_job": "7"}
    Path("outputs/runs/one/started.json").write_text(json.dumps(started))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "outputs/runs/one/config.yaml: loss._target_: found" in refused(main(SHORT), capsys)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("student", {"stem": "../../sent/evil"}),
        ("student.widths", [{"_target_": "evil.run"}]),
        ("student.depth", "${oc.env:SECRET}"),
        ("data", {"stem": "../../sent/evil"}),
        ("data.mean", {"_target_": "evil.run"}),
        ("data.mean", "${oc.decode:'{_target_: evil.run}'}"),
    ],
)
def test_the_run_of_a_checkpoint_that_is_quantized_names_no_code(place, value, folder, capsys):
    left("sent", put(begun("sent"), place, value))
    Path("sent/evil.yaml").write_text(yaml.safe_dump(TARGET))
    Path("sent/checkpoints").mkdir()
    Path("sent/checkpoints/best.ckpt").write_bytes(b"")
    refused(script("quantize", "checkpoint=sent/checkpoints/best.ckpt", "quantizer=rtn"), capsys)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("architecture.stem", "../../sent/evil"),
        ("architecture.stem", "module"),
        ("architecture.options", {"_target_": "evil.run"}),
        ("architecture.options", {"target": "evil.run"}),
        ("architecture.options.widths", [{"_target_": "evil.run"}]),
        ("architecture.options.depth", "${oc.env:SECRET}"),
        ("mean", {"_target_": "evil.run"}),
        ("mean", "${oc.env:SECRET}"),
        ("class_names", ["${oc.env:SECRET}"]),
    ],
)
def test_a_model_file_names_no_code(place, value, folder, capsys):
    options = {"depth": 8, "widths": [4, 4, 8, 16], "dropout": 0.0, "input_dropout": 0.0}
    architecture = {"stem": "resnet8", "options": options, "num_classes": 10}
    names = [str(number) for number in range(10)]
    about = NetworkDescription(architecture, names, [0.5], [0.5], [3, 8, 8])
    write_float(Path("net.safetensors"), models.build("resnet8", 10, **options), about)

    kind, described, tensors = read(Path("net.safetensors"))
    write(Path("sent.safetensors"), kind, put(described, place, value), tensors)
    refused(script("quantize", "checkpoint=sent.safetensors", "quantizer=rtn"), capsys)
    Path("picture.png").write_bytes(b"")
    assert script("predict", "sent.safetensors", "picture.png") == 2
    capsys.readouterr()
    assert not Path("mark").exists()


def test_a_report_builds_nothing(folder, capsys):
    left("sent", put(begun("sent"), "loss", TARGET))
    script("report", "sent", "-o", "report.md")
    assert not Path("mark").exists()


def test_a_yaml_that_lies_in_a_folder_of_the_users_options_is_not_an_option(folder, capsys):
    left("sent", put(begun("sent"), "loss", TARGET))
    refused(main(["resume=sent", "--config-dir", "."]), capsys)
    Path("mine/loss").mkdir(parents=True)
    Path("mine/loss/mine.yaml").write_text("_target_: evil.run.more")
    refused(main(["resume=sent", "--config-dir", "mine"]), capsys)


def test_what_an_honest_file_says_passes():
    for override in [
        *SHORT,
        "optimizer@teacher.training.optimizer=sgd",
        "export=[packed,onnx]",
        "~mixup",
        "method._target_=compress.methods.kd.KD",
        "output_directory='a/$b/c'",
        "loss.temperature=${seed}",
        "pruning.sparsity='${when:${data.limit},0.5,0.3}'",
        "stages=[{name: one, share: 0.5, overrides: ['method=kd']}]",
        "data.class_names=['C:\\\\x']",
    ]:
        check_overrides([override], "sweep.yaml")
    check_content({"student": {"target": "evil.run", "from_python": True}}, "config.yaml")


def test_a_sweep_whose_file_could_not_be_read_again_does_not_begin(folder, capsys):
    line = refused(main(["-m", *SHORT, "seed=0,1", "output_directory='${oc.env:SECRET}/x'"]), capsys)
    assert line.startswith(
        "error: output_directory: found '${oc.env:SECRET}/x', which sweep=DIRECTORY would not look up"
    )
    assert not Path("outputs").exists()


@pytest.mark.parametrize("typed", ["evil.run", "[1]", "", "null", "{a: b}"])
def test_only_a_list_of_names_is_allowed(typed):
    with pytest.raises(UserError, match="allow_targets: found "):
        allowed_targets([f"allow_targets={typed}"])


@pytest.mark.slow
def test_a_run_of_a_class_of_ones_own_goes_on_where_the_class_is_allowed(folder, capsys):
    assert main([*SHORT, "loss._target_=own.Mine", "hydra.run.dir=run"]) == 0
    Path("run/result.json").unlink()
    assert "loss._target_: found 'own.Mine'" in refused(main(["resume=run"]), capsys)
    assert "found 'own.Mine'" in refused(main(["resume=run", "allow_targets=[own.Min,own]"]), capsys)
    assert main(["resume=run", "allow_targets=[own.Mine]"]) == 0
    Path("run/result.json").unlink()
    compress.run(["resume=run", "allow_targets=[own.Mine]"])
    Path("mine/loss").mkdir(parents=True)
    Path("mine/loss/mine.yaml").write_text("_target_: own.Mine")
    Path("run/result.json").unlink()
    assert main(["resume=run", "--config-dir", "mine"]) == 0


@pytest.mark.slow
def test_a_sweep_of_a_class_of_ones_own_goes_on_where_the_class_is_allowed(folder, capsys):
    sweep = ["-m", *SHORT, "loss._target_=own.Mine", "seed=0,1", "hydra.sweep.dir=swept"]
    assert main([*sweep, "+hydra.job.env_set.MARK=set", "stages=[{name: one, overrides: []}]"]) == 0
    for name in ("result.json", "1-one/result.json"):
        Path("swept/1", name).unlink()
    capsys.readouterr()
    assert "swept/sweep.yaml: loss._target_: found 'own.Mine'" in refused(main(["sweep=swept"]), capsys)
    assert main(["sweep=swept", "allow_targets=[own.Mine]"]) == 0
    streams = capsys.readouterr()
    assert "'+hydra.job.env_set.MARK=set'], which count only where they are typed" in streams.err
    assert Path("swept/1/result.json").exists()


@pytest.mark.slow
def test_a_search_for_a_class_of_ones_own_goes_on_where_the_class_is_allowed(folder, capsys):
    space = {"loss._target_": ["own.Mine"], "optimizer.lr": {"low": 1e-3, "high": 1e-2}}
    Path("search.yaml").write_text(yaml.safe_dump({"overrides": SHORT, "space": space}))
    typed = ["search", "search.yaml", "found", "--trials"]
    assert "found 'own.Mine'" in refused(script(*typed, "1"), capsys)
    for trials in ("1", "2"):
        assert script(*typed, trials, "allow_targets=[own.Mine]") == 0
    Path("mine/search").mkdir(parents=True)
    Path("search.yaml").rename("mine/search/own.yaml")
    assert script("search", "own", "found", "--trials", "3", "--config-dir", "mine") == 0
