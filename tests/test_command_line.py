"""The command line: what it refuses and how it says so, and what it prints without training."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from processes import Script

from compress.cli import main
from compress.config.compose import compose_job, initialized
from compress.config.roles import register
from compress.pipeline.check import checked_jobs

SCRIPT = Path(__file__).parent.parent / "scripts" / "run.py"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


# What is only found once the networks are built, or beside the jobs of a sweep, is found as well with small ones.
QUICK = "method=supervised student=resnet8"
MISTAKES = {
    "student=resnet99": ["student:", "'resnet99'", "resnet18"],
    "student=": ["student:", "''", "resnet18"],
    "optimizer.lr=abc": ["optimizer.lr:", "'abc'", "greater than 0"],
    "optimizer.lr=-1": ["optimizer.lr:", "-1", "greater than 0"],
    "optimizer.lrr=1": ["optimizer.lrr:", "betas"],
    "+optimizer.lrr=1": ["optimizer.lrr:", "betas"],
    "optimizer=sgd optimizer.nesterov=true optimizer.momentum=0": ["optimizer:", "momentum"],
    "+method.foo=1": ["method.foo:", "accepted"],
    "+foo=1": ["foo:", "seed"],
    "optimiser=sgd": ["optimiser:", "optimizer"],
    "trainr.max_epochs=3": ["trainr:", "trainer"],
    "teacher.trainig.epochs=3": ["teacher.trainig:", "training"],
    "method=supervised teacher=resnet50": ["teacher:", "no teacher"],
    "method=kd teacher=none": ["teacher:", "resnet50"],
    "method=supervised loss=kd": ["loss:", "cross_entropy"],
    "method=kd loss=cross_entropy": ["loss:", "dkd"],
    "loss.temperature=0": ["loss.temperature:", "greater than 0"],
    "method=kd loss.alpha=2": ["loss.alpha:", "2"],
    "quantizer.bits=[0]": ["quantizer.bits", "0"],
    "quantizer.bits=[33]": ["quantizer.bits", "33"],
    "quantizer.bits=[]": ["quantizer.bits", "[]"],
    "data.root=/nowhere data=cifar10": ["data.root:", "cifar-10-python.tar.gz"],
    "data=folder data.root=/nowhere": ["data.root:", "/nowhere"],
    "data.validation_fraction=1.5": ["data.validation_fraction:", "1.5"],
    "trainer.max_epochs=-5": ["trainer.max_epochs:", "-5"],
    "trainer.early_stopping=0": ["trainer.early_stopping:", "0"],
    "+trainer.foo=1": ["trainer.foo:", "max_epochs"],
    "scheduler=multistep scheduler.milestones=[0]": ["scheduler.milestones", "0"],
    "student.dropout=1.5": ["student.dropout:", "1.5"],
    "teacher.checkpoint=/nowhere.pt": ["teacher.checkpoint:", "/nowhere.pt"],
    "teacher.training.epochs=0": ["teacher.training.epochs:", "0"],
    "seed=-1": ["seed:", "-1"],
    "mixup=[nan]": ["mixup:", "[nan]"],
    "quantizer=[true]": ["quantizer:", "[true]"],
    "export=[[packed]]": ["export:", "[[packed]]"],
    "trainer=[]": ["trainer:", "[]"],
    "method={a:1}": ["method.a:", "unknown"],
    "data.image_size=100000000": ["data.image_size:", "MB"],
    "data.crop_padding=1000000": ["data.crop_padding:", "1000000"],
    f"{QUICK} student.depth=999999998": ["student.depth:", "1202"],
    f"{QUICK} student.widths=[100000000,100000000,1,1]": ["student resnet8:", "MB"],
    "logger=tensorboard logger.tensorboard.name=/dev/null": ["logger.tensorboard.name:", "/dev/null"],
    "logger=wandb": ["logger:", "API key", "offline"],
    "logger=[csv,wandb]": ["logger:", "API key", "offline"],
    "logger=[csv,nosuch]": ["logger:", "'nosuch'", "wandb"],
    "logger=wandb logger.wandb.project=a/b": ["logger.wandb.project:", "'a/b'", "128"],
    "logger=wandb logger.wandb.tags=x": ["logger.wandb.tags:", "'x'", "list"],
    "logger=wandb +logger.wandb.foo=1": ["logger.wandb.foo:", "log_models"],
    "a b": ["'a'", "key=value"],
    "trainer.max_epochs=two": ["trainer.max_epochs:", "'two'", "at least 1"],
    f"{QUICK} output_directory=/proc/foo": ["output_directory:", "/proc/foo"],
    "--dryrun": ["--dryrun", "--dry-run"],
    "foo": ["'foo'", "key=value"],
    "scheduler=multistep scheduler.milestones=[a]": ["scheduler.milestones", "'a'"],
    "quantizer=qronos quantizer.solver.damping=0": ["quantizer.solver.damping:", "greater than 0"],
    "quantizer=spfq quantizer.solver.seed=a": ["quantizer.solver.seed:", "'a'"],
    "quantizer=gptq +quantizer.solver.seed=1": ["quantizer.solver.seed:", "damping"],
    "quantizer.solver.soft_threshold=-1": ["quantizer.solver.soft_threshold:", "-1"],
    "quantizer.refinement.scale_candidates=0": ["quantizer.refinement.scale_candidates:", "0"],
    "quantizer.refinement.sweep=4": ["quantizer.refinement.sweep:", "sweeps"],
    "quantizer.refinement=4": ["quantizer.refinement:", "mapping"],
    "quantizer=rtn quantizer.refinement.sweeps=4": ["quantizer.refinement:", "rtn"],
    "quantizer.grid.granularity=layer quantizer.correction.batch_norm=true": ["quantizer.correction.batch_norm:"],
    "quantizer.budget=8x quantizer.max_drop=1": ["quantizer.max_drop:", "budget"],
    f"{QUICK} quantizer.budget=small": ["quantizer.budget:", "'small'", "500kB"],
    "quantizer.solver._target_=foo.bar": ["quantizer.solver:", "foo.bar"],
    "quantizer.solver._target_=compress.losses.kd.KD": ["quantizer.solver:", "Solver"],
    "student=timm student.name=resnet51t": ["student.name:", "resnet51q"],
    f"{QUICK} quantizer.skip=[nosuch]": ["quantizer.skip:", "nosuch", "layer1"],
    f"{QUICK} quantizer.skip=['*']": ["no layer left"],
    "method=kd method.teacher_cache=0": ["method.teacher_cache:", "0", "at least 1"],
    "method=kd method.teacher_cache=often": ["method.teacher_cache:", "'often'", "auto"],
    "method=kd mixup=images method.teacher_cache=2": ["method.teacher_cache:", "blended", "auto"],
    "method=kd method.update_teacher=true method.teacher_cache=2": ["method.teacher_cache:", "learns"],
    "method=qat method.teacher_cache=2": ["method.teacher_cache:", "without a teacher"],
    "+method.seed=1": ["method.seed:", "accepted"],
    "method=supervised method.teacher_cache=2": [
        "method.teacher_cache: found an unknown key of method=supervised",
        "no",
    ],
    "~method.skip": ["method.skip: found an unknown key of method=dkd", "accepted: teacher_cache"],
    "student=resnet8 ~student.skip": ["student.skip: found an unknown key of student=resnet8", "accepted: ", "widths"],
    f"{QUICK} method=qat_rate ~method.weight_rate": ["method.weight_rate", "found null for all three"],
    "+data.device=cuda": ["data.device:", "batch_size"],
    "method=null": ["method:"],
    "~optimizer": ["optimizer:"],
    "~seed": ["seed:"],
    "~trainer.accelerator": ["trainer.accelerator:"],
    "~teacher.training.optimizer": ["teacher.training.optimizer:"],
    "~trainer": ["trainer: found ~trainer, which takes away what is needed or not there; accepted: trainer=VALUE"],
    "~method=foo": ["method: found ~method=foo, which takes away", "accepted: method=VALUE"],
    "optimizer._target_=foo.bar": ["optimizer:", "foo.bar"],
    "trainer.devices=2": ["trainer.devices:", "2", "1", "trainer=ddp"],
    "trainer.sync_batchnorm=true": ["trainer.sync_batchnorm:"],
    "+trainer.sync_batchnorm=true": ["trainer.sync_batchnorm:", "trainer=ddp"],
    "trainer=ddp_cpu trainer.sync_batchnorm=true": ["trainer.sync_batchnorm:", "false"],
    f"{QUICK} trainer=ddp_cpu data.batch_size=63": ["data.batch_size:", "63", "multiple of 2, from 4 to"],
    f"{QUICK} trainer=ddp_cpu data.limit=100 data.batch_size=128": ["data.batch_size:", "85 training images", "to 84"],
    "trainer=ddp_cpu trainer.devices=0": ["trainer.devices:", "0"],
    f"{QUICK} trainer=ddp_cpu trainer.num_nodes=2": ["hydra.run.dir:", "several machines"],
    "trainer=ddp_cpu method=dml": ["trainer.strategy:", "peers"],
    "+trainer.use_distributed_sampler=true": ["trainer.use_distributed_sampler:"],
    "+trainer.fast_dev_run=true": ["trainer.fast_dev_run:"],
    "data.batch_size=1": ["data.batch_size:", "at least 2"],
    "teacher.mean=[0.5] teacher.standard_deviation=[0.5]": ["teacher.mean:", "null"],
    "trainer.precision=bf16-mixed trainer.gradient_clip_val=1": ["optimizer.fused", "false"],
    "resume=nowhere --dry-run": ["resume:", "option"],
    "resume=latest": ["resume:", "outputs/runs", "DIRECTORY"],
    "resume=latest output_directory=elsewhere": ["resume:", "elsewhere/runs"],
    "resume=nowhere": ["resume:", "nowhere"],
    "-m method=kd,dkd optimizer.lr=0.1,abc": ["optimizer.lr:", "'abc'"],
    "quantizer.bits=[2,2]": ["quantizer.bits:", "once"],
    "loss.temperature=inf": ["loss.temperature:", "inf"],
    "optimizer.lr=1e400": ["optimizer.lr:", "inf"],
    "student=densenet121 data.image_size=4": ["data.image_size:", "4", "student densenet121"],
    "teacher=vgg8 student=resnet8 data.image_size=4": ["data.image_size:", "4", "teacher vgg8"],
    "method=dml peer=vgg8 student=resnet8 data.image_size=4": ["data.image_size:", "4", "peer vgg8"],
    "method=dml teacher=resnet8": ["teacher:", "'teacher=resnet8'", "none"],
    "method=at method.layers=[nosuch]": ["method.layers:", "'nosuch'", "layer1"],
    f"{QUICK} hydra.run.dir=/proc/x": ["hydra.run.dir:", "/proc/x"],
    f"-m {QUICK} hydra.sweep.dir=/proc/x": ["hydra.sweep.dir:", "/proc/x"],
    "--cfg foo": ["--cfg", "'foo'", "'job'"],
    "--cfg job student=resnet99": ["student:", "'resnet99'"],
    "--cfg job loss.foo=1": ["loss.foo:", "temperature"],
    "--cfg job -m student=resnet8": ["-m:"],
    "sweep=nowhere": ["sweep:", "nowhere/sweep.yaml"],
    "sweep=nowhere --dry-run": ["sweep:", "option"],
    "-m seed=0,1 hydra/launcher=nosuch": ["hydra/launcher:", "'nosuch'", "joblib"],
    f"{QUICK} hydra/launcher=joblib": ["hydra/launcher=joblib", "-m"],
    f"-m {QUICK} hydra/launcher=joblib,ray": ["hydra/launcher:", "several"],
    f"-m {QUICK} hydra/launcher=joblib hydra.launcher.n_jobs=0": ["hydra.launcher.n_jobs:", "0"],
    f"-m {QUICK} hydra/launcher=joblib hydra.launcher.jobs=2": ["hydra.launcher.jobs:", "n_jobs"],
    f"-m {QUICK} hydra/launcher=submitit_local hydra.launcher.timeout_min=x": ["hydra.launcher.timeout_min:", "'x'"],
    f"-m {QUICK} hydra/launcher=submitit_slurm": ["hydra/launcher:", "no sbatch"],
    f"-m {QUICK} hydra/launcher=ray hydra.launcher.num_gpus=-1": ["hydra.launcher.num_gpus:", "-1"],
    f"-m {QUICK} hydra/launcher=ray hydra.launcher.num_gpus=1.5": ["hydra.launcher.num_gpus:", "1.5", "whole"],
    f"-m {QUICK} hydra/launcher=ray hydra.launcher.num_cpus=9999": ["hydra.launcher:", "num_cpus=9999", "this machine"],
    f"-m {QUICK} hydra/launcher=ray hydra.launcher.address=127.0.0.1:9": [
        "hydra.launcher.address:",
        "127.0.0.1:9",
        "refused",
    ],
    f"-m {QUICK} hydra.sweep.subdir=x": ["hydra.sweep.subdir:"],
    "--frobnicate": ["--frobnicate", "--help"],
    "seed=0,1": ["seed:", "0,1", "-m"],
    "student=resnet8 -m seed=0,1 optimizer.lr=a": ["optimizer.lr:", "'a'"],
    "student=resnet8 --cfg foo seed=1": ["--cfg", "'foo'"],
    "sweep=latest": ["sweep:", "outputs/sweeps", "DIRECTORY"],
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_nothing_behind(arguments, tmp_path, capsys):
    code = main(arguments.split())
    streams = capsys.readouterr()
    lines = streams.err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1, streams.err
    for part in MISTAKES[arguments]:
        assert part in lines[0]
    assert streams.out == ""
    assert list(tmp_path.iterdir()) == []
    assert not Path("/nowhere").exists()


@pytest.mark.slow
def test_a_mistake_in_a_real_process_has_no_traceback(tmp_path):
    process = Script(SCRIPT, "student=resnet99", folder=tmp_path)
    said = process.said()[1]
    assert process.wait() == 2
    assert "Traceback" not in said
    assert said.startswith("error: student: found 'resnet99'")


MISTYPED = ["method=kdd", "optimizer.lrr=1", "optimiser=sgd", "student=resnet9", "seed=0,1", "seed=-1", "~student"]


@pytest.mark.parametrize("typed", [*MISTYPED, "+foo=1", "trainer.max_epochs=x", "+trainer.logger=true"])
def test_a_mistyped_word_is_refused_before_pytorch_is_imported(typed):
    code = "import sys; from compress.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, typed], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2 False\n")
    assert done.stderr.startswith(f"error: {typed.partition('=')[0].lstrip('+~')}: ")


def test_options_may_stand_between_overrides(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    assert main(["student=resnet8", "--cfg", "job", "seed=7"]) == 0
    shown = OmegaConf.create(capsys.readouterr().out)
    assert (shown.student.stem, shown.seed) == ("resnet8", 7)


@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir"])
def test_a_file_is_no_directory_of_a_run(key, tmp_path, capsys):
    (tmp_path / "taken").touch()
    assert main([*(["-m"] if "sweep" in key else []), *QUICK.split(), f"{key}=taken"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {key}: found taken, which cannot be made")


@pytest.mark.parametrize("place", ["/dev/null", "taken", "taken/below", "dangling", "loop/below", "x" * 300])
@pytest.mark.parametrize(
    ("typed", "key"),
    [
        ("--dry-run", "output_directory"),
        ("--dry-run", "hydra.run.dir"),
        ("--dry-run -m", "output_directory"),
        ("--dry-run -m", "hydra.sweep.dir"),
    ],
)
def test_a_dry_run_refuses_a_place_that_can_hold_no_directory(typed, key, place, tmp_path, capsys):
    (tmp_path / "taken").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.iterdir())
    assert main([*typed.split(), *QUICK.split(), f"{key}={place}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.match(rf"error: {key}: found {re.escape(place)}(/\w+)?, which cannot be made \(.+\); accepted: ", line)
    assert sorted(tmp_path.iterdir()) == before


def test_a_dry_run_refuses_a_place_that_can_hold_no_teacher(tmp_path, capsys):
    typed = ["student=resnet8", "method=kd", "teacher=resnet8", "hydra.run.dir=new", "output_directory=/dev/null"]
    assert main(["--dry-run", *typed]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: output_directory: found /dev/null/teachers, which cannot be made (/dev/null is no")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("typed", "name", "line"),
    [
        ("resume", "sweep.yaml", "error: resume: found there, the directory of a sweep; accepted: sweep=there"),
        ("sweep", "config.yaml", "error: sweep: found there, the directory of a run; accepted: resume=there"),
    ],
)
def test_a_run_is_told_from_a_sweep(typed, name, line, capsys):
    Path("there").mkdir()
    Path("there", name).touch()
    assert main([f"{typed}=there"]) == 2
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize("content", [b"a: [1\n", bytes(range(256)), b"", b"- 1\n", b"text", b"a: ${b", b"a: 1"])
def test_a_directory_whose_configuration_is_damaged_cannot_be_resumed(content, tmp_path, capsys):
    (tmp_path / "config.yaml").write_bytes(content)
    assert main([f"resume={tmp_path}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: resume: found {tmp_path}/config.yaml, which ")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_values_that_mean_the_same_reach_the_run_as_what_they_mean():
    typed = ["trainer.max_epochs=1e1", "data.batch_size=3.2e1", "optimizer.lr='0.1'", "data.limit=1e3"]
    composed = checked_jobs([*QUICK.split(), *typed])[0].config
    found = composed.trainer.max_epochs, composed.data.batch_size, composed.optimizer.lr, composed.data.limit
    assert found == (10, 32, 0.1, 1000)
    assert [type(value) for value in found] == [int, int, float, int]


def test_a_sweep_can_glob_over_options():
    jobs = checked_jobs(["scheduler=glob(*)", *QUICK.split()], multirun=True)
    stems = {path.stem for path in (SCRIPT.parent.parent / "conf" / "scheduler").glob("*.yaml")}
    assert {job.overrides[0] for job in jobs} == {f"scheduler={stem}" for stem in stems}


def test_help_names_every_group_and_every_option(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for path in (SCRIPT.parent.parent / "conf").glob("hydra/launcher/*.yaml"):
        assert f"\n  {path.stem} " in said
    for path in (SCRIPT.parent.parent / "conf").glob("*/*.yaml"):
        assert path.stem in said or path.parent.name == "search"
        assert path.parent.name in ("model", "search") or f"\n{path.parent.name}: " in said


def test_cfg_job_prints_the_composed_configuration(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    assert main(["--cfg", "job", "method=kd", "student=resnet8", "--resolve"]) == 0
    config = OmegaConf.create(capsys.readouterr().out)
    assert config.loss._target_ == "compress.losses.kd.KD"
    assert config.student.stem == "resnet8"
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_sizes_and_times_and_writes_nothing(tmp_path, capsys):
    assert main(["--dry-run", "experiment=quickstart"]) == 0
    said = capsys.readouterr().out
    for part in ("resnet8x4", "1,210,410", "resnet8_narrow", "19,954", "2 bit", "on this machine"):
        assert part in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_every_file_of_every_group_composes():
    root = SCRIPT.parent.parent / "conf"
    stems = {}
    for path in sorted(root.glob("*/*.yaml")):
        # The experiments compose in tests/config, and `search` is of scripts/search.py.
        if path.parent.name not in ("experiment", "search"):
            stems.setdefault({"model": "student"}.get(path.parent.name, path.parent.name), []).append(path.stem)
    register()
    with initialized():
        # One file of each group at a time.
        for number in range(max(map(len, stems.values()))):
            chosen = {group: names[number % len(names)] for group, names in stems.items()}
            typed = [f"{group}={stem}" for group, stem in chosen.items()]
            # The one file with a key that only the user can fill in.
            typed += ["student.target=mynet.MyNet"] if chosen["student"] == "module" else []
            composed = compose_job(typed).config
            assert set(composed) >= {"student", "teacher", "data", "method", "loss", "optimizer", "trainer", "seed"}
            assert composed.student.stem == chosen["student"]


@pytest.mark.slow
def test_a_run_goes_on_when_the_reader_of_its_output_has_gone(tmp_path):
    words = ["method=supervised", "student=resnet8", "quantizer=none", "trainer.max_epochs=1", "data.limit=200"]
    command = [sys.executable, str(SCRIPT), *words, "hydra.run.dir=left"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 0, said
    assert (tmp_path / "left" / "result.json").exists()
