"""Pruned weights stay zero from the optimizer to the file, exactly as many as asked for, and networks really shrink."""

import copy
import json

import pytest
import torch

import compress
from compress import models
from compress.cli import main
from compress.export.description import NetworkDescription
from compress.export.packed import read_model, write_float
from compress.export.weights import load_weights
from compress.models import masks
from compress.pruning.magnitude import Magnitude, magnitude_masks
from compress.pruning.nm import nm_mask
from compress.pruning.structured import Structured

RUN = ["student=resnet8", "method=supervised", "data.limit=300", "trainer.max_epochs=2", "quantizer.bits=[4]"]
RUN += ["quantizer.calibration_images=64", "logger=none"]
DESCRIPTION = {"class_names": [str(i) for i in range(10)], "mean": [0.5], "standard_deviation": [0.2]}


def saved_masks(directory, network="model", file="best.ckpt"):
    saved = torch.load(directory / "checkpoints" / file, map_location="cpu", weights_only=True)
    state = saved["state_dict"]
    names = [name for name in state if masks.is_mask(name) and name.startswith(f"{network}.")]
    for name in names:
        stem = name.removesuffix(masks.MASK)
        weight = state.get(f"{stem}weight", state.get(f"{stem}parametrizations.weight.original"))
        assert bool((weight[~state[name]] == 0).all())
    return {name.removeprefix(f"{network}.").removesuffix(f".{masks.MASK}"): state[name] for name in names}


def zeros(found):
    return sum(int((~mask).sum()) for mask in found.values())


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.95])
def test_exactly_as_many_weights_go_as_the_sparsity_says_and_they_are_the_smallest(scope, sparsity):
    torch.manual_seed(0)
    # Rounded, so that many are equal.
    weights = {"a": torch.randn(7, 5, 3, 3).mul(4).round(), "b": torch.randn(11, 13).mul(4).round()}
    found = magnitude_masks(weights, sparsity, scope)
    for names in [["a", "b"]] if scope == "global" else [["a"], ["b"]]:
        values = torch.cat([weights[name].abs().flatten() for name in names])
        kept = torch.cat([found[name].flatten() for name in names])
        assert int((~kept).sum()) == round(sparsity * len(values))
        if sparsity:
            assert values[~kept].max() <= values[kept].min()


def test_of_every_m_weights_along_the_input_channels_the_n_largest_stay():
    torch.manual_seed(0)
    weight = torch.randn(6, 8, 3, 3)
    mask = nm_mask(weight, 2, 4)
    for out in range(6):
        for group in range(2):
            for place in range(9):
                values = weight[out, 4 * group : 4 * group + 4].reshape(4, 9)[:, place].abs()
                kept = mask[out, 4 * group : 4 * group + 4].reshape(4, 9)[:, place]
                assert set(values.topk(2).indices.tolist()) == set(kept.nonzero().flatten().tolist())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "weights"),
    [
        (["pruning.sparsity=0.9", "pruning.when=schedule"], 77360),
        (["pruning.sparsity=0.9", "pruning.when=after", "trainer.ema_decay=0.9"], 77360),
        (["pruning.sparsity=0.9", "pruning.when=start", "method=qat", "quantizer=gpfq"], 77360),
        (["pruning.sparsity=0.9", "pruning.when=start", "method=dml"], 77360),
    ],
)
def test_the_mask_has_exactly_its_zeros_after_training_and_the_files_have_them(tmp_path, monkeypatch, options, weights):
    monkeypatch.chdir(tmp_path)
    result = compress.run([*RUN, "pruning=magnitude", *options])
    directory = tmp_path / result.directory
    network = result.record.student.network
    found = saved_masks(directory, network)
    assert sum(mask.numel() for mask in found.values()) == weights
    assert zeros(found) == round(0.9 * weights)
    for other in {"model", "others.0"} if "method=dml" in options else {"model"}:
        assert zeros(saved_masks(directory, other, "last.ckpt")) == round(0.9 * weights)
    for row in result.rows:
        model, _ = read_model(directory / row.file)
        for name, mask in found.items():
            assert bool((model.get_submodule(name).weight[~mask] == 0).all()), (row.file, name)
        assert row.sparsity >= 0.9 - 1e-5
        assert row.macs == result.record.student.macs
    file = result.rows[1].file.removeprefix("models/")
    assert {layer.encoding for layer in result.record.layers[file].quantized.values()} >= {"entropy"}


@pytest.mark.slow
@pytest.mark.parametrize("options", [["pruning.when=schedule"], ["method=qat", "quantizer=gpfq"]])
def test_two_of_four_stay_in_every_checkpoint_and_file(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    result = compress.run([*RUN, "pruning=nm", *options])
    found = saved_masks(tmp_path / result.directory)
    # The stem has three input channels.
    assert len(found) == 9
    assert list(result.record.pruning.dense) == ["conv1"]
    assert all(kept_of_every_four(mask).eq(2).all() for mask in found.values())
    assert len(result.rows) == (3 if "method=qat" in options else 2)
    for row in result.rows:
        model, _ = read_model(tmp_path / result.directory / row.file)
        weights = {name: model.get_submodule(name).weight for name in found}
        assert all(kept_of_every_four(weight != 0).le(2).all() for weight in weights.values()), row.file


def kept_of_every_four(kept):
    """Of a boolean (O, I, ...), how many of every four of the I input channels."""
    return kept.movedim(1, -1).reshape(-1, 4).sum(dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["trainer.ema_decay=0.9"]])
def test_a_resumed_run_prunes_as_the_undisturbed_one_bit_for_bit(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    long = [*RUN, "pruning=magnitude", "pruning.end_epoch=2", "pruning.interval=2", "data.batch_size=32", *options]
    long += ["trainer.max_epochs=2", "optimizer=sgd"]
    whole = tmp_path / compress.run(long).directory

    from compress.training import fit as training

    class CutOffError(Exception):
        pass

    def stop(self, trainer, pl_module):
        raise CutOffError

    with monkeypatch.context() as patched:
        # The second epoch is cut off before its end.
        end = training.Divergence.on_train_epoch_end
        patched.setattr(
            training.Divergence,
            "on_train_epoch_end",
            lambda self, trainer, module: (stop if trainer.current_epoch else end)(self, trainer, module),
        )
        with pytest.raises(CutOffError):
            compress.run(long)
    [cut] = [path for path in (tmp_path / "outputs" / "runs").iterdir() if path != whole]
    assert main([f"resume={cut}"]) == 0
    one, other = (
        torch.load(path / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True) for path in (whole, cut)
    )
    assert zeros(saved_masks(cut, file="last.ckpt")) == round(0.8 * 77360)
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())


def test_a_copy_keeps_its_masks_and_a_file_its_zeros(tmp_path):
    model = models.build("resnet8", 10)
    Magnitude(sparsity=0.5).pruned(model, (3, 8, 8))
    twin = copy.deepcopy(model)
    assert masks.masks_of(twin)["conv1"] is not masks.masks_of(model)["conv1"]
    architecture = {"stem": "resnet8", "options": {}, "num_classes": 10}
    path = tmp_path / "model.safetensors"
    write_float(path, model, NetworkDescription(architecture, **DESCRIPTION, input_shape=(3, 8, 8)))
    again = models.build("resnet8", 10)
    load_weights(again, path)
    assert all(torch.equal(mask, masks.masks_of(model)[name]) for name, mask in masks.masks_of(again).items())
    assert zeros(masks.masks_of(again)) == round(0.5 * 77360)


@pytest.mark.slow
def test_a_shrunken_network_is_a_quarter_and_its_file_builds_it_again(tmp_path):
    torch.manual_seed(0)
    model = models.build("resnet18", 10)
    parameters, macs = models.count_parameters(model), models.count_macs(model, (3, 32, 32))
    model = Structured(ratio=0.5).shrink(model, (3, 32, 32)).eval()
    assert models.count_parameters(model) <= 0.26 * parameters
    assert models.count_macs(model, (3, 32, 32)) <= 0.26 * macs
    architecture = models.architecture({"stem": "resnet18"}, 10, model)
    path = tmp_path / "model.safetensors"
    description = NetworkDescription(architecture, **DESCRIPTION, input_shape=(3, 32, 32))
    write_float(path, model, description)
    read, _ = read_model(path)
    loaded = models.build("resnet18", 10).eval()
    load_weights(loaded, path)
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(read(images), model(images))
    assert torch.equal(loaded(images), model(images))
    from compress.export.onnx import Onnx, OnnxModel

    Onnx().write(tmp_path / "m.onnx", model, description)
    torch.testing.assert_close(OnnxModel.read(tmp_path / "m.onnx")(images), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_what_cannot_be_pruned_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for mistake, words in {
        "pruning=magnitude pruning.sparsity=1": "pruning.sparsity: found 1; accepted",
        "pruning=magnitude pruning.sparsity=-0.1": "pruning.sparsity: found -0.1; accepted",
        "pruning=nm pruning.n=5": "pruning.n: found 5 of every 4",
        "pruning=magnitude pruning.end_epoch=9": "pruning.end_epoch: found 9, which is after the last of 2 epochs",
        "pruning=magnitude pruning.when=after pruning.finetune_epochs=2": "pruning.finetune_epochs: found 2 of 2",
        "pruning=magnitude pruning.skip=[*]": "pruning: found magnitude, which has nothing to prune",
        "pruning=nm pruning.m=5": "pruning: found nm, which has nothing to prune",
        "pruning=structured pruning.ratio=0.99": "pruning.ratio: found 0.99, which leaves none of the 16 channels",
        "pruning=structured student=shufflenetv1": "pruning: found structured, which Torch-Pruning cannot do for this",
    }.items():
        assert main([*RUN, *mistake.split()]) == 2, mistake
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {words}"), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_structured_run_trains_and_exports_the_small_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = compress.run([*RUN, "pruning=structured"])
    record = json.loads((tmp_path / result.directory / "result.json").read_text())
    assert record["student"]["parameters"] < 0.27 * 78042
    again = models.build("resnet8", 10)
    load_weights(again, tmp_path / result.directory / "checkpoints" / "best.ckpt")
    assert models.count_parameters(again) == record["student"]["parameters"]
    assert [row.macs for row in result.rows] == [record["student"]["macs"]] * 2
