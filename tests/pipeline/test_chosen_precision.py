"""`trainer.precision=auto` becomes a value once: for a run, its stages, its resumed half and the jobs of a sweep."""

import json
from pathlib import Path

import pytest
import torch
from faults import stopped_in_the_second_epoch
from omegaconf import OmegaConf
from torch import nn

import compress
from compress.cli import main
from compress.config.compose import compose_jobs
from compress.config.values import check_values
from compress.errors import UserError
from compress.files import write_json
from compress.pipeline import precision
from compress.pipeline.check import checked_jobs
from compress.pipeline.given import overrides_for
from compress.pipeline.parts import Parts
from compress.training import precision as timing

SMALL = ["student=resnet8", "data.limit=100", "data.batch_size=16", "trainer.max_epochs=2", "trainer.accelerator=cpu"]
SMALL += ["trainer.log_every=0", "quantizer=none", "export=none"]
ALONE = ["method=supervised", *SMALL]
FLOAT32, BFLOAT16 = "32-true", "bf16-mixed"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def timed(monkeypatch):
    """A list with an entry for each time that steps are timed, on a processor that passes for one with bfloat16."""
    monkeypatch.setattr(precision, "low_precision_dtype", lambda device: torch.bfloat16)
    counted, speedup = [], timing.speedup_of_bfloat16
    monkeypatch.setattr(
        precision, "speedup_of_bfloat16", lambda *arguments: counted.append(arguments) or speedup(*arguments)
    )
    monkeypatch.setattr(timing, "STEPS", 2)
    monkeypatch.setattr(precision, "LEAST_WORK", 0)
    return counted


def wins(monkeypatch, value):
    """Lets `value` be what any timed step speaks for."""
    monkeypatch.setattr(timing, "GAIN", 0.0 if value == BFLOAT16 else float("inf"))


def parts_of(*overrides, networks=None):
    networks = networks or {}
    [job] = compose_jobs([*overrides, *overrides_for(networks, overrides)])
    check_values(job.config)
    return Parts(job.config, networks=networks)


def kept():
    return sorted(Path("outputs/teachers").glob("precision-*.json"))


def recorded(directory):
    """The precision that config.yaml and the record have; that configuration is the one that model files name."""
    assert main(["--verify", str(directory)]) == 0
    value = OmegaConf.load(f"{directory}/config.yaml").trainer.precision
    assert json.loads(Path(directory, "result.json").read_text())["hardware"]["precision"] == value
    return value


def states(directory):
    return [
        torch.load(Path(directory, "checkpoints", name), map_location="cpu", weights_only=True)["state_dict"]
        for name in ("best.ckpt", "last.ckpt")
    ]


def equal(one, other):
    assert [state.keys() for state in one] == [state.keys() for state in other]
    return all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)


def test_a_processor_without_bfloat16_times_and_keeps_nothing(timed, monkeypatch):
    monkeypatch.setattr(precision, "low_precision_dtype", lambda device: None)
    assert precision.decide(parts_of(*ALONE)) == (FLOAT32, ": the processor has no bf16")
    assert timed == kept() == []


@pytest.mark.parametrize("value", [FLOAT32, BFLOAT16])
def test_steps_are_timed_once_for_a_network_and_batch_size(timed, monkeypatch, value):
    wins(monkeypatch, value)
    first = precision.decide(parts_of(*ALONE))
    assert first[0] == value
    assert first[1].startswith(": bf16 would be " if value == FLOAT32 else ": ")
    assert first[1].endswith(" times as fast" if value == FLOAT32 else " times as fast as float32 in a timed step")
    assert precision.decide(parts_of(*ALONE, "seed=1", "optimizer=sgd")) == first
    assert len(timed) == len(kept()) == 1
    for changed in ("data.batch_size=8", "student=resnet20", "data.image_size=12"):
        precision.decide(parts_of(*ALONE, changed))
    assert len(timed) == len(kept()) == 4


def test_a_small_step_is_not_timed(timed, monkeypatch):
    monkeypatch.setattr(precision, "LEAST_WORK", 10**9)
    wins(monkeypatch, BFLOAT16)
    assert precision.decide(parts_of(*ALONE)) == (FLOAT32, ": a step is too small for bf16 to pay")
    assert (timed, kept()) == ([], [])


def test_whatever_teaches_a_student_and_copies_of_it_share_its_decision(timed):
    alone = precision.decide(parts_of(*ALONE))
    taught = ["method=kd", "teacher=ensemble", "teacher.members=[resnet8,resnet20]", *SMALL]
    assert precision.decide(parts_of(*taught)) == alone
    assert precision.decide(parts_of("method=dml", *SMALL)) == alone
    assert len(timed) == 1
    precision.decide(parts_of("method=dml", "peer=resnet20", *SMALL))
    assert [len(networks) for networks, *_ in timed] == [1, 2]


def test_what_is_drawn_and_on_how_many_threads_later_does_not_depend_on_the_timing(timed):
    parts = parts_of(*ALONE)
    torch.manual_seed(3)
    threads, expected = torch.get_num_threads(), torch.random.get_rng_state()
    precision.decide(parts)
    assert len(timed) == 1
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b'"threads": ', b'"threads": 1'),
        lambda content: b"\xff" + content,
        lambda content: b"[" * 100_000,
        lambda content: b"{}",
        lambda content: b"",
    ],
)
def test_a_damaged_decision_is_made_anew(timed, damage):
    precision.decide(parts_of(*ALONE))
    [path] = kept()
    path.write_bytes(damage(path.read_bytes()))
    renewed = precision.decide(parts_of(*ALONE))
    assert len(timed) == 2
    assert precision.decide(parts_of(*ALONE)) == renewed
    assert len(timed) == 2


@pytest.mark.parametrize("changes", [{"torch": "1.0"}, {"speedup": "2.0"}, {"speedup": float("nan")}, {"more": 1}])
def test_a_decision_about_something_else_is_made_anew(timed, changes):
    precision.decide(parts_of(*ALONE))
    [path] = kept()
    content = json.loads(path.read_text())
    del content["sha256"]
    write_json(path, content | changes)
    precision.decide(parts_of(*ALONE))
    assert len(timed) == 2
    write_json(path, content | {"speedup": 3.0})
    assert precision.decide(parts_of(*ALONE)) == (BFLOAT16, ": 3 times as fast as float32 in a timed step")
    assert len(timed) == 2


def test_where_nothing_can_be_kept_the_decision_counts_all_the_same(timed, monkeypatch):
    wins(monkeypatch, BFLOAT16)
    parts = parts_of(*ALONE, "output_directory=taken")
    Path("taken").write_text("a file")
    assert precision.decide(parts)[0] == BFLOAT16


class Float32Only(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.classifier = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, images):
        means = self.convolution(images).mean((2, 3))
        return self.classifier(torch.zeros(means.shape).index_add(1, torch.arange(8), means))


def test_a_network_that_fails_under_autocast_trains_in_float32(timed, monkeypatch):
    wins(monkeypatch, BFLOAT16)
    value, reason = precision.decide(parts_of(ALONE[0], *SMALL[1:], networks={"student": Float32Only()}))
    assert value == FLOAT32
    assert reason.startswith(": a step with bf16 fails (")
    assert len(timed) == 1
    assert kept() == []


def test_a_fused_optimizer_with_clipped_gradients_trains_in_float32(timed, monkeypatch):
    wins(monkeypatch, BFLOAT16)
    clipped = [*ALONE, "trainer.gradient_clip_val=1"]
    assert precision.decide(parts_of(*clipped))[0] == FLOAT32
    assert timed == []
    assert precision.decide(parts_of(*clipped, "optimizer.fused=false"))[0] == BFLOAT16


def test_what_was_typed_stays_and_a_teacher_takes_no_auto(timed, capsys):
    [job] = checked_jobs([*ALONE, "trainer.precision=bf16-true"])
    capsys.readouterr()
    precision.settle([job], Path("none"), None)
    assert job.config.trainer.precision == "bf16-true"
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"^teacher\.training\.precision: found 'auto'; accepted: .*32-true"):
        checked_jobs(["method=kd", "teacher=resnet8", *SMALL, "teacher.training.precision=auto"])


@pytest.mark.slow
def test_a_run_that_decides_for_float32_is_bit_for_bit_the_one_that_was_told_so(timed, monkeypatch, capsys):
    wins(monkeypatch, FLOAT32)
    compress.run([*ALONE, "student.dropout=0.2", "hydra.run.dir=auto"])
    assert "precision 32-true: bf16 would be " in capsys.readouterr().out
    compress.run([*ALONE, "student.dropout=0.2", "hydra.run.dir=typed", "trainer.precision=32-true"])
    assert "precision" not in capsys.readouterr().out
    assert len(timed) == 1
    assert recorded("auto") == recorded("typed") == FLOAT32
    assert equal(states("auto"), states("typed"))


@pytest.mark.slow
def test_a_resumed_run_goes_on_as_it_began_whatever_is_kept_now(timed, monkeypatch, capsys):
    wins(monkeypatch, BFLOAT16)
    compress.run([*ALONE, "hydra.run.dir=whole"])
    assert "precision bf16-mixed: " in capsys.readouterr().out
    with stopped_in_the_second_epoch(), pytest.raises(UserError, match="stopped"):
        compress.run([*ALONE, "hydra.run.dir=begun"])
    wins(monkeypatch, FLOAT32)
    compress.run(["resume=begun"])
    assert len(timed) == 1
    assert recorded("begun") == recorded("whole") == BFLOAT16
    assert equal(states("begun"), states("whole"))
    assert not equal(states("whole"), states(compress.run(ALONE).directory))


@pytest.mark.slow
def test_the_stages_of_a_run_take_one_decision(timed, monkeypatch):
    wins(monkeypatch, BFLOAT16)
    stages = ["{name: a, overrides: []}", "{name: b, overrides: ['trainer.precision=32-true']}"]
    stages += ["{name: c, overrides: ['data.batch_size=8']}"]
    compress.run([*ALONE, "trainer.max_epochs=1", f"stages=[{','.join(stages)}]", "hydra.run.dir=run"])
    assert len(timed) == 1
    assert recorded("run") == recorded("run/1-a") == recorded("run/3-c") == BFLOAT16
    assert recorded("run/2-b") == FLOAT32


@pytest.mark.slow
def test_processes_that_train_together_are_told_what_was_decided_for_their_share_of_a_batch(timed, monkeypatch):
    wins(monkeypatch, BFLOAT16)
    compress.run(["trainer=ddp_cpu", *ALONE, "hydra.run.dir=run"])
    [(_, batch_size, *_)] = timed
    assert batch_size == 8
    assert recorded("run") == BFLOAT16


@pytest.mark.slow
def test_the_jobs_of_a_sweep_take_one_decision_and_go_on_with_it(timed, monkeypatch):
    wins(monkeypatch, BFLOAT16)
    with stopped_in_the_second_epoch():
        assert main(["-m", "seed=0,1", *ALONE, "hydra.sweep.dir=swept"]) == 2
    wins(monkeypatch, FLOAT32)
    assert main(["sweep=swept"]) == 0
    assert len(timed) == 1
    assert [recorded(f"swept/{number}") for number in range(2)] == [BFLOAT16] * 2
