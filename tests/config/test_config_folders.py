"""Folders of the user's own YAML files: `--config-dir`, and Hydra's `hydra.searchpath`."""

import runpy
import sys
from pathlib import Path

import pytest
from bombs import BOMBS
from omegaconf import OmegaConf
from PIL import Image

import compress
from compress.cli import main
from compress.config.compose import searched_folders
from compress.errors import UserError
from compress.export.formats import available
from compress.paths import searching, user_folders

SCRIPTS = Path(__file__).parents[2] / "scripts"
SHORT = ["method=supervised", "trainer.max_epochs=1", "data.limit=200", "quantizer=none", "trainer.log_every=0"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a module and, in `mine`, a model and an experiment of the user's."""
    (tmp_path / "tiny_network.py").write_text(
        "from torch import nn\n\n"
        "def tiny(num_classes: int, width: int = 4):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(width, num_classes))\n"
    )
    for group, text in {
        "model": "_target_: tiny_network.tiny\nwidth: 6\n",
        "experiment": "# @package _global_\n# Mine.\ndefaults: [{override /student: tiny}]\nseed: 3\n",
    }.items():
        (tmp_path / "mine" / group).mkdir(parents=True)
        (tmp_path / "mine" / group / "tiny.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as an interpreter that was started there has it
    return tmp_path


@pytest.mark.parametrize("typed", [["--config-dir", "mine"], ["hydra.searchpath=[file://mine]"]])
@pytest.mark.slow
def test_a_run_is_composed_from_the_users_options_and_goes_on_with_them(folder, typed, capsys):
    assert main([*typed, "experiment=tiny", *SHORT, "hydra.run.dir=run"]) == 0
    config = OmegaConf.load("run/config.yaml")
    assert (config.student.stem, config.student.width, config.seed) == ("tiny", 6, 3)
    assert user_folders() == []  # nothing is remembered
    before = Path("run/tradeoff.csv").read_text().splitlines()[1].split(",")[:9]
    Path("run/result.json").unlink()
    assert main(["resume=run"]) == 2
    assert "student._target_: found 'tiny_network.tiny'" in (said := capsys.readouterr().err)
    assert said.endswith(" on the command line, or --config-dir DIR with others\n")
    assert main(["--config-dir", "mine", "resume=run"]) == 0
    assert Path("run/tradeoff.csv").read_text().splitlines()[1].split(",")[:9] == before


@pytest.mark.slow
def test_a_sweep_in_other_processes_knows_them_too(folder):
    options = ["-m", "seed=0", "student=tiny", *SHORT, "hydra.sweep.dir=swept", "hydra/launcher=joblib"]
    assert main(["--config-dir=mine", *options]) == 0
    assert {path.parent.name for path in Path("swept").glob("*/result.json")} == {"0"}


def test_they_can_be_given_from_python(folder):
    with pytest.raises(UserError, match=r"student: found 'tiny'"):
        compress.run(["student=tiny", *SHORT])
    with pytest.raises(UserError, match=r"student\.width: found 'wide'; accepted: a whole number"):
        compress.run(["student=tiny", "student.width=wide", *SHORT], config_dir="mine")


def test_a_folder_that_is_not_there_is_a_mistake(folder, capsys):
    for typed, key in (
        (["--config-dir", "absent"], "--config-dir"),
        (["hydra.searchpath=[absent]"], "hydra.searchpath"),
    ):
        assert main([*typed, *SHORT]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {key}: found absent, which is no folder; accepted: ")
    assert searched_folders(["hydra.searchpath=[pkg://compress]"]) == []  # Hydra looks there itself


def test_cfg_prints_what_is_composed_from_them(folder, capsys):
    assert main(["--config-dir", "mine", "experiment=tiny", "--cfg", "job"]) == 0
    assert "width: 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "broken.yaml, line 1: found what cannot be read as YAML"),
        ("", "loss._target_: found None; accepted: the name of a class"),
        ("_target_: absent.Loss", "loss: found 'absent.Loss', which cannot be imported"),
        ("_target_: failing_loss.Loss", "loss: of no use"),
    ],
)
def test_an_option_of_the_users_that_cannot_be_used_is_one_line_before_any_work(folder, text, words, capfd):
    (folder / "mine" / "loss").mkdir()
    (folder / "mine" / "loss" / "broken.yaml").write_text(text)
    (folder / "failing_loss.py").write_text(
        "class Loss:\n    compares_with = None\n\n    def __init__(self):\n        raise ValueError('of no use')\n"
    )
    before = set(folder.iterdir())
    assert main(["--config-dir", "mine", "loss=broken", *SHORT]) == 2
    assert words in capfd.readouterr().err.splitlines()[-1]
    # It does not stand in the way of the other options either.
    assert main(["--config-dir", "mine", "loss=kd", *SHORT]) == 2
    accepted = capfd.readouterr().err.splitlines()[-1].partition("accepted: ")[2].split(", ")
    assert "cross_entropy" in accepted
    assert set(folder.iterdir()) - before <= {folder / "__pycache__"}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize(
    ("group", "typed"),
    [
        ("loss", ["loss=bomb"]),
        ("loss", ["--cfg", "job", "loss=bomb"]),
        ("model", ["student=bomb"]),
        ("export", ["export=bomb"]),
        ("experiment", ["experiment=bomb"]),
    ],
)
def test_a_bomb_in_an_option_of_the_users_is_one_line(folder, group, typed, bomb, capsys):
    file = folder / "mine" / group / "bomb.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(BOMBS[bomb])
    assert main(["--config-dir", "mine", *typed, *SHORT]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{file}: found what cannot be read as YAML" in line


@pytest.mark.parametrize("bomb", BOMBS)
def test_one_in_an_option_that_is_read_with_all_others_is_too(folder, bomb):
    file = folder / "mine" / "export" / "bomb.yaml"
    file.parent.mkdir()
    file.write_text(BOMBS[bomb])
    with searching([folder / "mine"]), pytest.raises(UserError, match=r"bomb\.yaml: found what cannot be read as YAML"):
        available()


@pytest.mark.slow
def test_a_model_file_of_the_users_network_is_quantized_again_and_classifies(folder, monkeypatch, capsys):
    result = compress.run(["student=tiny", *SHORT], config_dir="mine")
    file = str(result.directory / "models" / "student-fp32.safetensors")
    Image.new("L", (8, 8), 90).save("grey.png")
    for script, typed in (
        ("predict", [file, "grey.png"]),
        ("quantize", [f"checkpoint={file}", "quantizer=rtn", "quantizer.bits=[4]"]),
    ):
        monkeypatch.setattr(sys, "argv", [script, *typed, "--config-dir", "mine"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
        assert ended.value.code == 0, capsys.readouterr().err
    assert len(list(Path("outputs/quantized").glob("*/models/student-rtn-4bit.safetensors"))) == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("_target_: null\nwidth: 6\n", "found _target_, width"),
        ("_target_: tiny_network.tin\n", "whose _target_ 'tiny_network.tin' cannot be imported"),
        ("_target_: tiny\n", "whose _target_ 'tiny' cannot be imported"),
    ],
)
def test_a_model_of_the_users_that_names_no_class_is_one_line(folder, text, found, capsys):
    Path("mine/model/tiny.yaml").write_text(text)
    assert main(["--config-dir", "mine", "student=tiny", "--dry-run", *SHORT]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert found in line
