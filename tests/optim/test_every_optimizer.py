"""What holds for every optimizer: groups, and a run that was stopped and resumed equals the undisturbed one."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

import compress
from compress import models
from compress.cli import main
from compress.config.compose import compose_jobs
from compress.optim.groups import optimizer_factory, without_decay
from compress.optim.library import muon, soap
from compress.paths import CONF
from compress.results.record import Record
from compress.training.fit import Checkpoint, epoch_of

SMALL = ["student=resnet8", "method=supervised", "data.limit=400", "quantizer=none", "trainer.max_epochs=2"]
STEMS = sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml"))
NO_DECAY = "optimizer.decay_norm_and_bias=false"
# Roots and bases are to be renewed within the few steps of these runs, and after the stop.
OPTIMIZERS = {
    **{stem: [f"optimizer={stem}"] for stem in STEMS},
    "shampoo": ["optimizer=shampoo", "optimizer.root_interval=4", NO_DECAY],
    "summed": ["optimizer=shampoo", "optimizer.beta2=1", "optimizer.grafting=none", "optimizer.root_interval=3"],
    "soap": ["optimizer=soap", "optimizer.precondition_frequency=3", NO_DECAY],
    "muon": ["optimizer=muon", NO_DECAY],
    "bf16": ["optimizer=shampoo", "optimizer.root_interval=2", "trainer.precision=bf16-true", "data.limit=150"],
    "peers": ["optimizer=shampoo", "method=dml", "optimizer.root_interval=4"],
    **{f"{stem}_qat": [f"optimizer={stem}", "method=qat", "method.activation_bits=4"] for stem in ("shampoo", "soap")},
    "muon_qat": ["optimizer=muon", "method=qat"],
}
# Every kind of state: a momentum, roots, bases, two sorts of parameters, half precision. Other tests resume AdamW,
# and the rest combines these with methods; `make soak` has them all.
KINDS = ("sgd", "shampoo", "soap", "muon", "bf16")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in KINDS else pytest.mark.soak) for name in OPTIMIZERS]
)
def test_a_run_stopped_after_an_epoch_and_resumed_equals_the_undisturbed_one(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    stopped = tmp_path / "stopped"
    save = Checkpoint.on_train_epoch_end

    def copy_after_the_first(self, trainer, module):
        save(self, trainer, module)
        if self.monitor is None and trainer.current_epoch == 0:
            # What `kill -9` would leave now.
            shutil.copytree(Path(self.dirpath).parent, stopped)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "on_train_epoch_end", copy_after_the_first)
        whole = compress.run([*SMALL, *OPTIMIZERS[name]])
    assert epoch_of(stopped / "checkpoints/last.ckpt") == 1
    assert main([f"resume={stopped}"]) == 0
    assert (stopped / "metrics.csv").read_text() == (whole.directory / "metrics.csv").read_text()
    assert Record.read(stopped / "result.json").student == whole.record.student
    ends = [
        torch.load(each / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)
        for each in (stopped, whole.directory)
    ]
    assert any(state for end in ends for each in end["optimizer_states"] for state in each["state"].values())
    ends = [[end["state_dict"], *(each["state"] for each in end["optimizer_states"])] for end in ends]
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize("stem", STEMS)
def test_biases_and_norms_decay_or_not_as_chosen(stem):
    network = models.build("resnet8", 10)
    expected = [each for name, each in network.named_parameters() if "bn" in name or each.ndim == 1]
    for overrides, kept in (([], []), ([NO_DECAY], expected)):
        config = compose_jobs([*SMALL, f"optimizer={stem}", "optimizer.weight_decay=0.1", *overrides])[0].config
        optimizer = optimizer_factory(config.optimizer)(network.parameters())
        without, decayed = [], []
        for group in optimizer.param_groups:
            (decayed if group["weight_decay"] else without).extend(group["params"])
        assert {id(each) for each in without} == {id(each) for each in kept}
        assert len(without) + len(decayed) == len(list(network.parameters()))

    # With gradients of zero nothing but decay moves a weight.
    before = [each.detach().clone() for each in network.parameters()]
    for each in network.parameters():
        each.grad = torch.zeros_like(each)
    for _ in range(2):
        optimizer.step()
    moved = {id(new) for old, new in zip(before, network.parameters(), strict=True) if not torch.equal(old, new)}
    assert moved == {id(each) for each in network.parameters() if each.ndim > 1}


def test_groups_that_a_method_made_keep_their_options():
    weight, bias, step = (torch.nn.Parameter(torch.ones(shape)) for shape in ((3, 3), (3,), ()))
    made = [{"params": [weight, bias], "lr": 0.5}, {"params": [step], "weight_decay": 0.0}]
    assert [(group["params"], group.get("lr"), group.get("weight_decay")) for group in without_decay(made)] == [
        ([weight], 0.5, None),
        ([bias], 0.5, 0.0),
        ([step], None, 0.0),
    ]
    assert made[0]["params"] == [weight, bias]
    groups = muon(without_decay(made), weight_decay=0.1).param_groups
    assert [(group["params"], group["use_muon"], group["weight_decay"]) for group in groups] == [
        ([weight], True, 0.1),
        ([bias], False, 0.0),
        ([step], False, 0.0),
    ]


def test_muon_makes_the_steps_of_convolutions_orthogonal_and_leaves_the_rest_to_adamw():
    torch.manual_seed(0)
    weight, bias = torch.nn.Parameter(torch.randn(8, 3, 3, 3)), torch.nn.Parameter(torch.randn(8))
    twin = torch.nn.Parameter(bias.detach().clone())
    start = weight.detach().clone()
    weight.grad, bias.grad = torch.randn(8, 3, 3, 3), torch.randn(8)
    twin.grad = bias.grad.clone()
    muon([weight, bias], lr=1.0, weight_decay=0.1, adamw_lr=0.01).step()
    values = torch.linalg.svdvals((0.9 * start - weight.detach()).flatten(1))
    assert values.min() > 0.6
    assert values.max() < 1.3
    torch.optim.AdamW([twin], lr=0.01, weight_decay=0.1).step()
    torch.testing.assert_close(bias, twin)


def test_soap_turns_convolutions_into_their_eigenbases():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 3, 3, 3))
    optimizer = soap([weight])
    for _ in range(3):
        weight.grad = torch.randn(8, 3, 3, 3)
        optimizer.step()
    bases = optimizer.state[weight]["Q"]
    assert [len(basis) for basis in bases] == [8, 3, 3, 3]
    for basis in bases:
        torch.testing.assert_close(basis @ basis.mT, torch.eye(len(basis)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stem", ["soap", "muon"])
def test_a_missing_library_is_one_line_that_names_the_extra(tmp_path, monkeypatch, capsys, stem):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    assert main([*SMALL, f"optimizer={stem}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "optimizer: found" in line
    assert "pip install 'compress[optim]'" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("optimizer=shampoo optimizer.grafting=rmsprop", ["optimizer.grafting:", "'rmsprop'", "none, sgd, adam"]),
        ("optimizer=shampoo optimizer.root_interval=0", ["optimizer.root_interval:", "0", "at least 1"]),
        ("optimizer=shampoo optimizer.beta2=1.5", ["optimizer.beta2:", "1.5", "at most 1"]),
        ("optimizer=shampoo +optimizer.betas=[0.9,0.99]", ["optimizer.betas:", "unknown key", "beta2"]),
        ("optimizer=muon optimizer.adamw_betas=[0.9]", ["optimizer.adamw_betas:", "2 elements"]),
        ("optimizer=soap optimizer.precondition_frequency=1.5", ["optimizer.precondition_frequency:", "1.5"]),
        ("optimizer.decay_norm_and_bias=maybe", ["optimizer.decay_norm_and_bias:", "'maybe'", "true or false"]),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_accepted(tmp_path, monkeypatch, capsys, typed, words):
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, *typed.split()]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())
