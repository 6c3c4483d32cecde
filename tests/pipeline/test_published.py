"""Runs whose student or teacher starts from published weights, which lie where PyTorch keeps its downloads."""

import json
import re

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

import compress
from compress.cli import main
from compress.config.compose import compose_jobs
from compress.config.values import check_values
from compress.errors import UserError
from compress.pipeline.check import checked_jobs
from compress.pipeline.standalone import quantize_checkpoint

timm = pytest.importorskip("timm")
STUDENT = ["student=timm", "student.name=resnet10t", "student.pretrained=true"]
TEACHER = ["teacher=torchvision", "teacher.model.name=squeezenet1_1", "teacher.pretrained=IMAGENET1K_V1"]

CLASSES = ["tench", "goldfish", 2, 3, 4, 5, 6, 9, 8, "cock"]


@pytest.fixture(autouse=True)
def downloads(tmp_path, monkeypatch):
    from torchvision.models import get_model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t").state_dict(), folder / "resnet10t.c3_in1k.safetensors")
    torch.save(get_model("squeezenet1_1").state_dict(), folder / "squeezenet1_1-b8a52dc0.pth")
    return folder


def checked(*overrides):
    [job] = compose_jobs(overrides)
    check_values(job.config)
    return job.config


def test_size_and_normalisation_of_the_weights_are_taken_over_unless_others_are_typed(tmp_path):
    config = checked(*STUDENT, "data=folder")
    assert (config.data.image_size, config.student.input_size) == (176, None)
    assert config.data.mean == [0.485, 0.456, 0.406]
    config = checked(*STUDENT, "data=folder", "data.image_size=64", "data.mean=[0.5]", "data.standard_deviation=[1]")
    assert (config.data.image_size, config.student.input_size) == (64, 176)
    assert (config.data.mean, config.data.standard_deviation) == ([0.5], [1])
    assert checked(*STUDENT, "student.input_size=32").student.input_size == 32
    assert checked("data=folder").data.image_size == 32
    config = checked("method=kd", *TEACHER)
    assert (config.teacher.model.input_size, config.teacher.mean) == (224, [0.485, 0.456, 0.406])
    assert config.data.mean is None


def test_a_network_for_one_size_is_made_for_that_of_its_weights(downloads):
    (downloads / "me--small").mkdir()
    network = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3)
    save_file(network.state_dict(), downloads / "me--small" / "model.safetensors")
    about = {"input_size": [3, 64, 64], "fixed_input_size": True, "mean": [0.5] * 3, "std": [0.5] * 3}
    about = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "pretrained_cfg": about}
    (downloads / "me--small" / "config.json").write_text(json.dumps(about))
    config = checked("student=timm", "student.name=hf-hub:me/small", "student.pretrained=true", "data=folder")
    assert (config.data.image_size, config.student.input_size) == (64, 64)
    kept = torch.load(config.student.checkpoint, weights_only=True)
    assert torch.equal(kept["pos_embed"], network.pos_embed)


def test_a_configuration_with_weights_is_the_same_when_it_is_checked_again():
    config = checked("method=kd", *STUDENT, *TEACHER, "teacher.classes=[tench,1,2,3,4,5,6,7,8,9]")
    assert (config.student.pretrained, config.teacher.pretrained) == ("c3_in1k", "IMAGENET1K_V1")
    assert config.teacher.classes[0] == "tench"
    again = OmegaConf.create(OmegaConf.to_yaml(config))
    check_values(again)
    assert again == config


@pytest.mark.slow
def test_a_student_of_other_classes_learns_from_a_teacher_whose_classes_are_chosen(downloads, tmp_path):
    (tmp_path / "classes.yaml").write_text("".join(f"{digit}: {name}\n" for digit, name in enumerate(CLASSES)))
    result = compress.run(
        [
            "method=kd",
            *STUDENT,
            "student.head=new",
            "student.input_size=32",
            *TEACHER,
            "teacher.model.input_size=32",
            "teacher.classes=classes.yaml",
            "data.limit=100",
            "trainer.max_epochs=1",
            "optimizer.lr=1e-12",
            "quantizer=none",
        ]
    )
    published = load_file(downloads / "resnet10t.c3_in1k.safetensors")
    trained = load_file(result.directory / result.rows[0].file)
    torch.testing.assert_close(trained["network.layer1.0.conv1.weight"], published["layer1.0.conv1.weight"])
    assert trained["network.fc.weight"].shape == (10, 512)
    assert result.directory.name.endswith("-kd-resnet10t")
    student = result.record.student
    assert (student.model, student.weights, student.licence) == ("resnet10t", "resnet10t c3_in1k", "apache-2.0")
    assert r"began as, resnet10t c3\_in1k: apache-2.0" in (result.directory / "README.md").read_text()
    assert json.loads((result.directory / "result.json").read_text())["teacher"]["model"] == "squeezenet1_1"


@pytest.mark.slow
def test_weights_are_quantized_on_pictures_without_labels_and_without_a_checkpoint(tmp_path):
    (tmp_path / "pictures").mkdir()
    noise = torch.randint(0, 256, (12, 64, 64, 3), dtype=torch.uint8)
    for index, image in enumerate(noise):
        Image.fromarray(image.numpy()).save(tmp_path / "pictures" / f"{index}.png")
    chosen = [word.replace("student", "model") for word in STUDENT]
    directory = quantize_checkpoint(
        [*chosen, "data=folder", "data.root=pictures", "data.image_size=32", "model.input_size=32", "quantizer=rtn"]
    )
    files = sorted(path.name for path in (directory / "models").iterdir())
    assert any(name.endswith(".safetensors") for name in files)
    card = (directory / "README.md").read_text()
    assert "- quantized as it was found, not trained" in card
    assert r"began as, resnet10t c3\_in1k: apache-2.0" in card
    assert "accuracy" not in card
    with pytest.raises(UserError, match=r"^checkpoint: found none; accepted: .* or model\.pretrained=true"):
        quantize_checkpoint(["model=timm", "model.name=resnet10t", "quantizer=rtn"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"classes.yaml cannot be read \(.*No such file"),
        ("[", "classes.yaml cannot be read"),
        ("[1, 2]", "found a list in classes.yaml; accepted: a YAML or JSON file that maps each class of the data"),
        ("{0: 1, 1: 2}", "found no '2' in classes.yaml"),
        ("{0: 1, 1: [2]}", r"found \[2\] for '1' in classes.yaml"),
        (str(dict.fromkeys(range(10), 1)), "found class 1 of .* twice"),
        (str(dict.fromkeys(range(10), "cat")), "found 'cat'; accepted: one of tench, goldfish"),
    ],
)
def test_a_file_that_maps_no_classes_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "classes.yaml").write_text(content)
    with pytest.raises(UserError, match=f"^teacher.classes: {message}"):
        checked_jobs(["method=kd", *TEACHER, "teacher.model.input_size=32", "teacher.classes=classes.yaml"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("student=resnet20 student.pretrained=true", "student.pretrained: found True for resnet20; accepted: false"),
        ("student=timm student.name=resnet10t.c3_in1k", "student.name: found 'resnet10t.c3_in1k'; accepted: a name"),
        ("{student} student.pretrained=1", "student.pretrained: found 1; accepted: true, false, or the name"),
        ("{student} student.checkpoint=x.pt", "student.pretrained: found c3_in1k beside student.checkpoint"),
        ("{student} quantizer=none", "student.checkpoint: .*c3_in1k.*converted.pt has 1000 classes, the data have 10"),
        (
            "student=torchvision student.pretrained=true",
            "student.pretrained: found weights that are not on this machine and cannot be fetched .*resnet18-f37072fd",
        ),
        ("method=kd {teacher} teacher.classes=[cat]", "teacher.classes: found 'cat'; accepted: one of tench, goldfish"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys, words, message):
    words = words.format(student=" ".join(STUDENT), teacher=" ".join(TEACHER)).split()
    assert main(words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.match(f"error: {message}", line), line
    assert not (tmp_path / "outputs").exists()
