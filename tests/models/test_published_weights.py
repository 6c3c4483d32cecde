"""Weights that are published under a name, from files that were fetched before; nothing is fetched here."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import get_model

from compress.errors import UserError
from compress.models.pretrained import published

timm = pytest.importorskip("timm")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where PyTorch keeps what it has downloaded; the caches are empty and no connection works."""
    from huggingface_hub import constants

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def of(stem, name, weights=True):
    return published({"stem": stem, "name": name}, weights, "student.pretrained")


def equal(found, network):
    assert set(found) == set(network.state_dict())
    return all(torch.equal(found[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "weights"), [("resnet10t", True), ("resnet10t.c3_in1k", True), ("resnet10t", "c3_in1k")]
)
def test_weights_of_timm_are_read_from_a_file_that_was_put_there(folder, name, weights):
    network = timm.create_model("resnet10t")
    save_file(network.state_dict(), folder / "resnet10t.c3_in1k.safetensors")
    about = of("timm", name, weights)
    assert (about.options, about.weights, about.size) == ({"name": "resnet10t"}, "c3_in1k", 176)
    assert about.mean == (0.485, 0.456, 0.406)
    assert equal(about.tensors(None), network)


def on_hub(path, network, **description):
    save_file(network.state_dict(), path / "model.safetensors")
    about = {"input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "first_conv": "conv1"}
    content = {"architecture": "resnet10t", "num_classes": 2, "label_names": ["cat", "dog"], "pretrained_cfg": about}
    (path / "config.json").write_text(json.dumps(content | description))


@pytest.mark.parametrize("cached", [True, False])
def test_weights_on_the_hub_are_read_from_its_cache_or_from_files_that_were_put_there(folder, tmp_path, cached):
    network = timm.create_model("resnet10t", num_classes=2)
    place = folder / "me--pets"
    if cached:
        place = tmp_path / "hub" / "models--me--pets" / "snapshots" / "0123"
        (tmp_path / "hub" / "models--me--pets" / "refs").mkdir(parents=True)
        (tmp_path / "hub" / "models--me--pets" / "refs" / "main").write_text("0123")
    place.mkdir(parents=True)
    on_hub(place, network)
    about = of("timm", "hf-hub:me/pets")
    assert (about.options, about.weights, about.size) == ({"name": "resnet10t"}, "hf-hub:me/pets", 96)
    assert (about.mean, about.standard_deviation) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert about.class_names == ("cat", "dog")
    assert equal(about.tensors(None), network)


def test_a_description_on_the_hub_does_not_choose_how_weights_are_read(folder):
    (folder / "me--pets").mkdir()
    on_hub(folder / "me--pets", timm.create_model("resnet10t", num_classes=2))
    config = folder / "me--pets" / "config.json"
    for changed in ({"architecture": "os.system"}, {"model_args": {"block_fn": "x"}}, {"model_args": {"in_chans": 1}}):
        config.write_text(json.dumps(json.loads(config.read_text()) | changed))
        with pytest.raises(UserError, match=r"student.pretrained: found '(os.system|hf-hub:me/pets)'"):
            of("timm", "hf-hub:me/pets")
    for content in ("{}", '{"architecture": "resnet10t", "pretrained_cfg": {}}', "[]", "{"):
        config.write_text(content)
        with pytest.raises(UserError, match="which cannot be read"):
            of("timm", "hf-hub:me/pets")


@pytest.mark.parametrize("weights", [True, "IMAGENET1K_V1", "SqueezeNet1_1_Weights.IMAGENET1K_V1"])
def test_weights_of_torchvision_are_named_by_their_enumeration(folder, weights):
    network = get_model("squeezenet1_1")
    torch.save(network.state_dict(), folder / "squeezenet1_1-b8a52dc0.pth")
    about = of("torchvision", "squeezenet1_1", weights)
    assert (about.weights, about.size, about.class_names[0]) == ("IMAGENET1K_V1", 224, "tench")
    assert equal(about.tensors(None), network)


def test_the_older_names_in_densenets_file_are_understood(folder):
    network = get_model("densenet121")
    state = network.state_dict()
    older = {
        name.replace("norm1", "norm.1").replace("conv2", "conv.2") if "denselayer" in name else name: tensor
        for name, tensor in state.items()
    }
    torch.save(older, folder / "densenet121-a639ec97.pth")
    assert equal(of("torchvision", "densenet121").tensors(None), network)


@pytest.mark.slow
def test_a_vision_transformer_gets_positions_for_images_of_another_size(folder):
    torch.save(get_model("vit_b_32").state_dict(), folder / "vit_b_32-d86f8d99.pth")
    tensors = of("torchvision", "vit_b_32").tensors(64)
    assert tensors["encoder.pos_embedding"].shape == (1, 5, 768)
    of_timm = timm.create_model("vit_tiny_patch16_224").state_dict()
    save_file(of_timm, folder / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors")
    tensors = of("timm", "vit_tiny_patch16_224").tensors(64)
    assert tensors["pos_embed"].shape == (1, 17, 192)


def test_a_pickle_that_runs_code_is_refused(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"a": Evil()}, folder / "squeezenet1_1-b8a52dc0.pth")
    with pytest.raises(UserError, match=r"squeezenet1_1-b8a52dc0\.pth"):
        of("torchvision", "squeezenet1_1").tensors(None)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("stem", "name", "file"),
    [
        ("timm", "resnet10t", "https://huggingface.co/timm/resnet10t.c3_in1k/resolve/main/model.safetensors as {}"),
        ("timm", "gcvit_xxtiny", "https://github.com/.*pth as {}"),
        ("torchvision", "resnet18", "https://download.pytorch.org/models/resnet18-f37072fd.pth as {}"),
    ],
)
def test_without_a_connection_a_line_says_which_file_is_to_be_put_where(folder, stem, name, file):
    with pytest.raises(UserError, match=f"cannot be fetched .*; accepted: a connection, or {file.format(folder)}/"):
        of(stem, name).tensors(None)
    with pytest.raises(UserError, match=r"config.json as .*/me--pets/config.json"):
        of("timm", "hf-hub:me/pets")


@pytest.mark.parametrize(
    ("stem", "name", "weights", "message"),
    [
        ("resnet20", None, True, "found True for resnet20; accepted: false, or a network of timm or torchvision"),
        ("timm", "resnet10t", "c4", "found 'c4', which are no weights of resnet10t; accepted: c3_in1k"),
        ("timm", "resnet10", True, "found 'resnet10'; accepted: a name of timm"),
        ("timm", "hf-hub:pets", True, "found 'hf-hub:pets'; accepted: hf-hub:OWNER/NAME"),
        ("torchvision", "resnet18", "V3", "found 'V3', which are no weights of resnet18; accepted: IMAGENET1K_V1"),
        ("torchvision", "resnet19", True, "found 'resnet19'; accepted: a classifier of torchvision, such as resnet1"),
    ],
)
def test_what_is_not_published_is_refused_with_what_is(stem, name, weights, message):
    with pytest.raises(UserError, match=f"^student.pretrained: {message}"):
        of(stem, name, weights)
