"""Weights from files: the layouts understood, the files refused, and a model that a failure leaves alone."""

import argparse
import datetime
import gzip
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compress.errors import UserError
from compress.export import container
from compress.export.weights import load_weights
from compress.models import build


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(1)
    model = build("resnet8", 10)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(-1, 1)
    return model.state_dict()


@pytest.fixture
def model():
    torch.manual_seed(2)
    return build("resnet8", 10)


def behind(prefix, weights):
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def same(model, weights):
    return all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def refusal(model, path, **options):
    """The one line with which a file is refused; checks that the model did not change."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as failure:
        load_weights(model, path, **options)
    message = str(failure.value)
    assert "\n" not in message
    assert str(path) in message
    assert message.startswith(f"{options.get('where', 'checkpoint')}: ")
    assert same(model, before)
    return message


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": weights, "epoch": 240, "best_acc": torch.tensor(79.4), "optimizer": {"state": {}}},
        lambda weights: {"model_state_dict": weights},
        lambda weights: {"model": {"state_dict": weights}},
        lambda weights: behind("module.", weights),
        lambda weights: {"state_dict": behind("model.", weights), "pytorch-lightning_version": "2.6.0"},
        lambda weights: {"state_dict": behind("student.", weights)},
        lambda weights: {"state_dict": behind("network.", weights)},
        lambda weights: {"state_dict": behind("module.model.", weights)},
        lambda weights: {"state_dict": behind("model._orig_mod.", weights)},
    ],
    ids=[
        *("plain", "lightning", "mdistiller", "tutorial", "nested"),
        *("parallel", "model", "student", "network", "stacked", "compiled"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin"])
def test_a_layout_is_understood(wrap, suffix, weights, model, tmp_path):
    path = tmp_path / f"weights.{suffix}"
    torch.save(wrap(weights), path)
    load_weights(model, path)
    assert same(model, weights)


@pytest.mark.parametrize(
    "stem", ["resnet20", "resnet8x4", "wrn_16_1", "vgg8", "vgg13", "mobilenetv2", "shufflenetv1", "shufflenetv2"]
)
def test_an_mdistiller_file_of_every_family_is_read(stem, tmp_path):
    model, source = build(stem, 100), build(stem, 100).state_dict()
    torch.save({"epoch": 240, "model": behind("module.", source), "best_acc": 0.7}, tmp_path / "ckpt_epoch_240.pth")
    load_weights(model, tmp_path / "ckpt_epoch_240.pth")
    assert same(model, source)


def test_a_safetensors_file_is_read(weights, model, tmp_path):
    save_file(behind("model.", weights), tmp_path / "weights.safetensors", {"format": "pt"})
    load_weights(model, str(tmp_path / "weights.safetensors"))
    assert same(model, weights)


def test_a_file_from_before_the_zip_format_is_read(weights, model, tmp_path):
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_weights(model, tmp_path / "old.pth")
    assert same(model, weights)


def test_among_several_networks_the_one_that_fits_is_taken(weights, model, tmp_path):
    teacher = build("resnet20", 10).state_dict()
    hundred = build("resnet8", 100).state_dict()
    content = behind("model.", teacher) | behind("network.", hundred) | behind("student.", weights)
    content["loss.weight"] = torch.ones(3)
    torch.save({"state_dict": content}, tmp_path / "several.ckpt")
    load_weights(model, tmp_path / "several.ckpt")
    assert same(model, weights)


def test_a_model_whose_own_keys_look_like_a_prefix_loads(tmp_path):
    source, target = (nn.ModuleDict({"model": nn.Linear(3, 2), "network": nn.Linear(3, 2)}) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "own.pt")
    load_weights(target, tmp_path / "own.pt")
    assert same(target, source.state_dict())


@pytest.mark.slow
def test_a_lightning_checkpoint_as_the_trainer_writes_it_is_read(weights, model, tmp_path):
    import pytorch_lightning as lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"lr": 0.1, "milestones": [1, 2]})
            self.model = build("resnet8", 10)

        def training_step(self, batch):
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    module = Module()
    module.model.load_state_dict(weights)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", max_steps=1, enable_checkpointing=False, **quiet)
    trainer.fit(module, torch.randn(2, 2, 3, 8, 8))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    load_weights(model, tmp_path / "last.ckpt")
    assert same(model, module.model.state_dict())
    assert not same(model, weights)


def test_the_counters_of_batch_norm_may_be_absent(weights, model, tmp_path):
    path = tmp_path / "without.pt"
    torch.save({name: tensor for name, tensor in weights.items() if "num_batches" not in name}, path)
    load_weights(model, path)
    assert same(model, weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_become_the_models(dtype, weights, model, tmp_path):
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    torch.save(cast, tmp_path / "cast.pt")
    load_weights(model, tmp_path / "cast.pt")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert same(model, {name: tensor.to(weights[name].dtype) for name, tensor in cast.items()})


def test_missing_and_unknown_keys_are_named_and_counted(weights, model, tmp_path):
    path = tmp_path / "other.pt"
    torch.save({name: tensor for name, tensor in weights.items() if not name.startswith("layer3.0.")}, path)
    message = refusal(model, path, where="teacher.checkpoint")
    assert "lacks layer3.0.conv1.weight, layer3.0.bn1.weight, layer3.0.bn1.bias and 12 more" in message
    assert "accepted: exactly the model's" in message

    torch.save(behind("model.", weights | {"extra.weight": torch.ones(2)}), path)
    assert "has the unknown extra.weight" in refusal(model, path)

    torch.save({"encoder.weight": torch.ones(2)}, path)
    message = refusal(model, path)
    assert "lacks conv1.weight" in message
    assert "has the unknown encoder.weight" in message


def test_another_number_of_classes_is_said_in_those_words(model, tmp_path):
    path = tmp_path / "hundred.pt"
    torch.save({"model": build("resnet8", 100).state_dict()}, path)
    message = refusal(model, path, where="teacher.checkpoint")
    assert message == f"teacher.checkpoint: {path} has 100 classes, the data have 10"


def test_another_shape_is_named_with_both_shapes(weights, model, tmp_path):
    path = tmp_path / "stem.pt"
    torch.save(weights | {"conv1.weight": torch.ones(16, 3, 7, 7)}, path)
    assert "conv1.weight (16, 3, 7, 7) for (16, 3, 3, 3)" in refusal(model, path)


def test_integer_weights_are_refused(weights, model, tmp_path):
    path = tmp_path / "codes.pt"
    torch.save(weights | {"fc.weight": weights["fc.weight"].to(torch.int8)}, path)
    assert "fc.weight int8" in refusal(model, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value, weights, model, tmp_path):
    path = tmp_path / "diverged.pt"
    torch.save(weights | {"fc.bias": torch.full((10,), value)}, path)
    assert re.search("no numbers in .*diverged.pt: fc.bias", refusal(model, path))


def test_tensors_without_values_are_refused(weights, model, tmp_path):
    path = tmp_path / "meta.pt"
    torch.save(weights | {"fc.weight": weights["fc.weight"].to("meta")}, path)
    assert "fc.weight without values" in refusal(model, path)


def test_a_packed_model_is_no_checkpoint(weights, model, tmp_path):
    path = tmp_path / "packed.safetensors"
    container.write(path, "compress-packed-2", {}, weights)
    assert "packed model and no checkpoint" in refusal(model, path)


def test_a_model_file_that_was_altered_is_refused(weights, model, tmp_path):
    path = tmp_path / "float.safetensors"
    container.write(path, "compress-float-1", {}, weights)
    load_weights(model, path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "damaged" in refusal(model, path)


@pytest.mark.parametrize("name", ["model_best.pth.tar", "weights.th", "UPPER.PTH", "weights.pkl", "weights", "v1.0"])
def test_a_file_may_have_any_name(name, weights, model, tmp_path):
    torch.save({"state_dict": behind("module.", weights)}, tmp_path / name)
    load_weights(model, tmp_path / name)
    assert same(model, weights)


def test_the_content_and_not_the_name_says_what_a_file_is(weights, model, tmp_path):
    save_file(weights, tmp_path / "tensors.pth")
    load_weights(model, tmp_path / "tensors.pth")
    assert same(model, weights)


@pytest.mark.parametrize(
    "prefix", ["net.", "backbone.", "net._orig_mod.", "model.encoder.", "module.module.", "any.0."]
)
def test_one_prefix_may_stand_before_all_names(prefix, weights, model, tmp_path):
    torch.save({"state_dict": behind(prefix, weights) | {"criterion.weight": torch.ones(3)}}, tmp_path / "some.ckpt")
    load_weights(model, tmp_path / "some.ckpt")
    assert same(model, weights)


def test_names_of_which_some_have_a_prefix_are_refused(weights, model, tmp_path):
    half = {f"module.{name}" if index % 2 else name: weights[name] for index, name in enumerate(weights)}
    torch.save(half, tmp_path / "half.pth")
    assert "accepted: exactly the model's" in refusal(model, tmp_path / "half.pth")


@pytest.mark.parametrize("key", ["net", "weights", "model_s", "student_state_dict", "state_dict_ema", "params_ema"])
def test_the_key_of_the_network_may_be_any(key, weights, model, tmp_path):
    torch.save({"epoch": 3, key: weights, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, tmp_path / "some.pth")
    load_weights(model, tmp_path / "some.pth")
    assert same(model, weights)


@pytest.mark.parametrize("keys", [("model", "model_ema"), ("state_dict", "state_dict_ema"), ("model", "ema")])
def test_a_moving_average_is_preferred_and_that_is_said_once(keys, weights, model, tmp_path, capsys):
    average = {name: tensor + 1 for name, tensor in weights.items()}
    torch.save(dict(zip(keys, (weights, average), strict=True)), tmp_path / "both.pth")
    for _ in range(2):
        load_weights(model, tmp_path / "both.pth", where="student.checkpoint")
    assert same(model, average)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.startswith("student.checkpoint: ")
    assert f"several networks that fit ({keys[1]} *, {keys[0]} *); took {keys[1]} *" in said


@pytest.mark.parametrize("zipped", [True, False])
def test_harmless_objects_beside_the_tensors_are_passed_over(zipped, weights, model, tmp_path):
    content = {
        "state_dict": weights,
        "best": numpy.float64(0.9),
        "history": numpy.arange(3),
        "args": argparse.Namespace(lr=0.1, out=Path("somewhere"), started=datetime.datetime(2024, 1, 2)),
        "order": OrderedDict(a=1),
    }
    torch.save(content, tmp_path / "timm.pth", _use_new_zipfile_serialization=zipped)
    load_weights(model, tmp_path / "timm.pth")
    assert same(model, weights)


def test_the_counters_of_a_profiler_are_left_out_and_that_is_said(weights, model, tmp_path, capsys):
    counters = {f"{name}.{kind}": torch.zeros(1) for name in ("conv1", "fc") for kind in ("total_ops", "total_params")}
    torch.save(behind("net.", weights | counters | {"total_ops": torch.ones(1)}), tmp_path / "thop.pth")
    load_weights(model, tmp_path / "thop.pth")
    assert same(model, weights)
    assert "left out 5 counters of a profiler" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "found", "accepted"),
    [
        (gzip.compress(b"weights", mtime=0), "a gzip archive", "the file in it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "a pointer of Git LFS", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "a web page", "downloaded anew"),
    ],
)
def test_what_is_often_taken_for_a_checkpoint_is_called_by_its_name(content, found, accepted, model, tmp_path):
    (tmp_path / "weights.pth").write_bytes(content)
    message = refusal(model, tmp_path / "weights.pth")
    assert f"found {found} at" in message
    assert accepted in message.partition("; accepted: ")[2]


def test_a_torchscript_program_is_refused_with_the_way_to_its_tensors(model, tmp_path):
    torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3))).save(tmp_path / "script.pt")
    assert "torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)" in refusal(model, tmp_path / "script.pt")


def test_a_missing_file_a_folder_and_another_archive_are_told_apart(model, tmp_path):
    assert "found no file at" in refusal(model, tmp_path / "absent.pt", where="teacher.checkpoint")
    assert "found a folder at" in refusal(model, tmp_path)
    numpy.savez(tmp_path / "weights.npz", weight=numpy.ones(3))
    assert "accepted: a file of tensors by name" in refusal(model, tmp_path / "weights.npz")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(suffix, kept, weights, model, tmp_path):
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert "damaged or no" in refusal(model, path)


@pytest.mark.parametrize("content", [b"not a checkpoint\n" * 50, bytes(range(256)) * 20, b"PK\x03\x04" + b"\0" * 500])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_of_something_else_is_refused(content, suffix, model, tmp_path):
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    assert "damaged or no" in refusal(model, path)


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), {"epoch": 3}, {}, {"model": {"lr": 0.1}}])
def test_a_file_without_a_state_dict_is_refused(content, model, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    assert "no tensors" in refusal(model, path)


class Payload:
    """Unpickled carelessly, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(zipped, weights, model, tmp_path):
    mark, path = tmp_path / "payload_ran", tmp_path / "malicious.pth"
    torch.save({"model": weights, "opt": Payload(mark)}, path, _use_new_zipfile_serialization=zipped)
    assert "could run code" in refusal(model, path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists(), "the payload is harmless, so the test proves nothing"


def test_code_in_a_bare_pickle_is_not_run_and_nothing_but_the_line_is_said(model, tmp_path, recwarn):
    mark, path = tmp_path / "payload_ran", tmp_path / "bare.bin"
    path.write_bytes(pickle.dumps(Payload(mark)))
    refusal(model, path)
    assert not mark.exists()
    assert list(recwarn) == []


def test_a_whole_network_is_refused_with_its_class_and_the_way_to_its_tensors(model, tmp_path):
    path = tmp_path / "whole.pth"
    torch.save(model, path)
    message = refusal(model, path)
    assert "found Python objects (compress.models.cifar_resnet.CifarResNet) beside the tensors" in message
    assert "accepted: tensors alone: where the file comes from, torch.save(model.state_dict(), NEW_FILE)" in message


@pytest.mark.parametrize(
    ("stem", "head"), [("resnet8", "fc"), ("densenet121", "classifier"), ("mobilenetv3_small", "classifier.3")]
)
def test_a_new_head_keeps_its_own_weights_and_takes_all_others(stem, head, tmp_path):
    source, model = build(stem, 100).state_dict(), build(stem, 10)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith(f"{head}.")}
    torch.save({"state_dict": behind("module.", source)}, tmp_path / "hundred.pth")
    load_weights(model, tmp_path / "hundred.pth", new_head=True)
    assert len(fresh) == 2
    assert same(model, source | fresh)


def test_a_file_without_a_head_goes_with_a_new_one_alone(weights, model, tmp_path):
    path = tmp_path / "backbone.pth"
    torch.save({name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}, path)
    assert "lacks fc.weight, fc.bias" in refusal(model, path)
    head = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith("fc.")}
    load_weights(model, path, new_head=True)
    assert same(model, weights | head)


def test_a_new_head_excuses_no_other_difference(weights, model, tmp_path):
    path = tmp_path / "stem.pt"
    torch.save(weights | {"conv1.weight": torch.ones(16, 3, 7, 7)}, path)
    assert "conv1.weight (16, 3, 7, 7) for (16, 3, 3, 3)" in refusal(model, path, new_head=True)


def test_a_student_of_other_classes_is_told_of_the_new_head(model, tmp_path):
    torch.save(build("resnet8", 100).state_dict(), tmp_path / "hundred.pt")
    with pytest.raises(UserError, match=r"the data have 10; accepted: .*, or student\.head=new$"):
        load_weights(model, tmp_path / "hundred.pt", way_out="student.head=new")


def test_the_classes_of_the_model_are_chosen_among_those_of_the_file(tmp_path):
    source, model = build("resnet8", 100), build("resnet8", 10)
    chosen = [7, 99, 0, 3, 50, 51, 52, 53, 54, 2]
    torch.save(source.state_dict(), tmp_path / "hundred.pt")
    load_weights(model, tmp_path / "hundred.pt", way_out="teacher.classes", classes=chosen)
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), source.eval()(images)[:, chosen])


def test_the_classes_of_a_model_file_have_names(weights, tmp_path):
    names = list("abcdefghij")
    container.write(tmp_path / "float.safetensors", "compress-float-1", {"class_names": names}, weights)
    model = build("resnet8", 2)
    load_weights(model, tmp_path / "float.safetensors", way_out="teacher.classes", classes=["j", "b"])
    assert torch.equal(model.fc.weight, weights["fc.weight"][[9, 1]])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([0, 10], "found 10; accepted: from 0 to 9, the classes of "),
        ([0, -1], "found -1; accepted: from 0 to 9, the classes of "),
        ([3, 3], "found class 3 of .* twice; accepted: each class once"),
        ([1, 2, 3], "found 3 classes, the data have 2; accepted: one for each of them"),
        (["cat", "dog"], "found 'cat'; accepted: an index, for .* names no classes"),
    ],
)
def test_wrong_classes_are_refused(classes, message, weights, tmp_path):
    torch.save(weights, tmp_path / "ten.pt")
    with pytest.raises(UserError, match=f"^teacher.classes: {message}"):
        load_weights(build("resnet8", 2), tmp_path / "ten.pt", way_out="teacher.classes", classes=classes)
