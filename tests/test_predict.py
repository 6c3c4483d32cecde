"""Classifying image files: the logits of the network on the pixels of the data pipeline, from the file alone."""

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Script
from torch.nn import functional as F

from compress import models
from compress.data.folder import Folder
from compress.data.image_file import PIXELS_KEY
from compress.data.normalisation import Normalisation
from compress.data.source import resized_rgb
from compress.errors import UserError
from compress.export.description import NetworkDescription
from compress.export.onnx import Onnx
from compress.export.packed import read_model, write_float, write_packed
from compress.predict import Predictor, pictures
from compress.quantization import quantize

SCRIPT = Path(__file__).parents[1] / "scripts" / "predict.py"
NAMES = [f"class {index}" for index in range(10)]
MEAN, DEVIATION = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
ABOUT = NetworkDescription(
    architecture={"stem": "resnet8", "options": {}, "num_classes": 10},
    class_names=NAMES,
    mean=MEAN,
    standard_deviation=DEVIATION,
    input_shape=(3, 16, 16),
)


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(0)
    model = models.build("resnet8", 10).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(32, 3, 16, 16))
    return quantize(model, [torch.randn(8, 3, 16, 16)], 4)


@pytest.fixture(scope="module")
def folder(quantized, tmp_path_factory):
    """A directory of the three kinds of model files and of images of several sizes and modes."""
    directory = tmp_path_factory.mktemp("predict")
    write_packed(directory / "packed.safetensors", quantized, ABOUT)
    write_float(directory / "float.safetensors", models.build("resnet8", 10), ABOUT)
    Onnx().write(directory / "model.onnx", quantized, ABOUT)
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(directory / "same.png")
    Image.fromarray(draw.integers(0, 256, (40, 40, 3), np.uint8)).save(directory / "large.png")
    Image.fromarray(draw.integers(0, 256, (16, 16), np.uint8)).save(directory / "grey.png")
    Image.fromarray(draw.integers(0, 256, (30, 50, 3), np.uint8)).save(directory / "wide.jpg", quality=90)
    Image.fromarray(draw.integers(0, 256, (9, 7, 4), np.uint8)).save(directory / "clear.webp", lossless=True)
    return directory


def pixels(path):
    """uint8 (1, C, H, W) of an image file, in the mode that it has."""
    content = torch.from_numpy(np.array(Image.open(path)))
    return (content[None, None] if content.dim() == 2 else content.permute(2, 0, 1)[None]).contiguous()


@pytest.mark.parametrize("name", ["same.png", "large.png", "grey.png"])
def test_a_square_image_becomes_what_the_data_pipeline_makes_of_it(folder, name):
    found = Predictor.read(folder / "packed.safetensors").image(folder / name)
    assert torch.equal(found, Normalisation(MEAN, DEVIATION, 16)(resized_rgb(pixels(folder / name), 16))[0])


def test_pixels_are_scaled_and_normalised_per_channel(folder):
    found = Predictor.read(folder / "packed.safetensors").image(folder / "same.png")
    values = pixels(folder / "same.png")[0].double() / 255
    mean, deviation = (torch.tensor(each, dtype=torch.float64).reshape(3, 1, 1) for each in (MEAN, DEVIATION))
    assert torch.allclose(found.double(), (values - mean) / deviation, atol=1e-5)


def test_a_wide_image_becomes_what_a_folder_of_images_makes_of_it(folder, tmp_path):
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / "wide.jpg").write_bytes((folder / "wide.jpg").read_bytes())
    source = Folder(str(tmp_path), image_size=16).read()
    found = Predictor.read(folder / "packed.safetensors").image(folder / "wide.jpg")
    assert torch.equal(found, Normalisation(MEAN, DEVIATION, 16)(source.test_images.decoded([0], 16))[0])


@pytest.mark.parametrize("file", ["packed.safetensors", "model.onnx"])
def test_classes_and_probabilities_are_those_of_the_network(folder, quantized, file):
    predictor = Predictor.read(folder / file)
    names = ["same.png", "large.png", "grey.png", "wide.jpg", "clear.webp"]
    found = predictor([folder / name for name in names], top=3)
    images = torch.stack([predictor.image(folder / name) for name in names])
    with torch.no_grad():
        expected = F.softmax(quantized.model(images).double(), 1)
    for each, name, row in zip(found, names, expected, strict=True):
        order = row.argsort(descending=True)[:3]
        assert each.path == str(folder / name)
        assert each.classes == tuple(NAMES[index] for index in order)
        assert np.allclose(each.probabilities, row[order], atol=1e-4)


def test_a_file_of_float_weights_is_a_model_too(folder):
    network, _ = read_model(folder / "float.safetensors")
    predictor = Predictor.read(folder / "float.safetensors")
    [found] = predictor([folder / "wide.jpg"], top=10)
    with torch.no_grad():
        expected = F.softmax(network(predictor.image(folder / "wide.jpg")[None]).double(), 1)[0]
    assert np.allclose(found.probabilities, expected.sort(descending=True).values, atol=1e-5)


def test_one_mean_stands_for_three_channels(folder, quantized, tmp_path):
    about = replace(ABOUT, mean=[0.5], standard_deviation=[0.25])
    write_packed(tmp_path / "model.safetensors", quantized, about)
    found = Predictor.read(tmp_path / "model.safetensors").image(folder / "grey.png")
    expected = (pixels(folder / "grey.png")[0].float() / 255 - 0.5) / 0.25
    assert torch.allclose(found, expected.expand(3, 16, 16), atol=1e-5)


# The script, and which of the libraries that only training needs it has imported.
WATCHED = """
import runpy, sys
try:
    runpy.run_path("scripts/predict.py", run_name="__main__")
finally:
    heavy = {"pytorch_lightning", "hydra", "wandb", "torchvision", "torchmetrics", "sklearn", "matplotlib", "onnx"}
    print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


def script(*arguments):
    """The standard output of the script, which imports none of those libraries."""
    command = [sys.executable, "-c", WATCHED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    return done.stdout


@pytest.mark.slow
def test_the_script_prints_a_line_per_image_without_the_libraries_that_only_training_needs(folder):
    images = [folder / "same.png", folder / "wide.jpg"]
    lines = script(folder / "packed.safetensors", *images, "--top", 2).splitlines()
    for line, image, found in zip(lines, images, Predictor.read(folder / "packed.safetensors")(images, 2), strict=True):
        (first, second), (most, less) = found.classes, found.probabilities
        assert line == f"{image}: {first} {100 * most:.1f} %, {second} {100 * less:.1f} %"


@pytest.mark.slow
def test_the_script_prints_json_without_the_libraries_that_only_training_needs(folder):
    [image] = json.loads(script(folder / "model.onnx", folder / "grey.png", "--json", "--top", 10))
    assert image["path"] == str(folder / "grey.png")
    assert sorted(each["class"] for each in image["classes"]) == NAMES
    assert sum(each["probability"] for each in image["classes"]) == pytest.approx(1)


MISTAKES = [
    ("none.safetensors", ["same.png"], 1, "none.safetensors: found no such file"),
    ("none.onnx", ["same.png"], 1, "none.onnx: found no such file"),
    ("same.png", ["same.png"], 1, "same.png: found no suffix of a model file"),
    ("packed.safetensors", ["none.png"], 1, "none.png: found no such file"),
    ("packed.safetensors", ["same.png", "model.onnx"], 1, "model.onnx: cannot be read"),
    ("packed.safetensors", ["same.png"], 11, "top: found 11; accepted: 1 to 10"),
    ("packed.safetensors", ["same.png"], 0, "top: found 0; accepted: 1 to 10"),
]


@pytest.mark.parametrize(("file", "images", "top", "message"), MISTAKES)
def test_a_mistake_is_named_in_one_line(folder, file, images, top, message):
    with pytest.raises(UserError) as mistake:
        Predictor.read(folder / file)([folder / image for image in images], top)
    assert message in str(mistake.value)
    assert len(str(mistake.value).splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["predict", "serve"])
def test_a_folder_of_own_parts_that_is_not_there_is_named(folder, name, capsys, monkeypatch):
    typed = [name, str(folder / "packed.safetensors"), "--config-dir", "nowhere"]
    monkeypatch.setattr(sys, "argv", [*typed, str(folder / "same.png")] if name == "predict" else typed)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT.with_name(f"{name}.py")), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: --config-dir: found nowhere, which is no folder; accepted: ")


@pytest.mark.slow
def test_the_script_ends_with_status_2_and_one_line_on_a_mistake(folder, tmp_path):
    one = Script(SCRIPT, folder / "packed.safetensors", folder / "same.png", folder / "model.onnx", folder=tmp_path)
    out, error = one.said()
    assert (one.wait(), len(out.splitlines())) == (2, 1)
    line, last = error.splitlines()
    assert line.startswith(f"error: {folder / 'model.onnx'}: cannot be read")
    assert last.startswith("error: 1 of 2 images could not be read")
    alone = Script(SCRIPT, folder / "packed.safetensors", folder / "model.onnx", "--json", folder=tmp_path)
    out, error = alone.said()
    assert (alone.wait(), out) == (2, "[]\n")
    assert error == f"{line}\n"
    other = Script(SCRIPT, folder / "none.safetensors", folder / "same.png", folder=tmp_path)
    out, error = other.said()
    assert (other.wait(), out) == (2, "")
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_a_bound_of_pixels_that_is_no_number_is_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setenv(PIXELS_KEY, "x")
    script = Script(SCRIPT, folder / "packed.safetensors", folder / "same.png", folder / "wide.jpg", folder=tmp_path)
    said = ["", f"error: {PIXELS_KEY}: found 'x'; accepted: a whole number above zero\n"]
    assert (script.said(), script.wait()) == (said, 2)


def test_folders_stand_for_the_images_in_them(folder, tmp_path):
    for name in ("a/one.png", "a/b/two.png", ".hidden/three.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((folder / "same.png").read_bytes())
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    named = [folder / "grey.png", tmp_path]
    assert pictures(named) == [folder / "grey.png", tmp_path / "a/b/two.png", tmp_path / "a/one.png"]
    with pytest.raises(UserError, match="empty: holds no image; accepted: an image"):
        pictures([tmp_path / "empty"])


def test_a_bad_image_does_not_lose_the_answers_for_the_others(folder):
    predictor = Predictor.read(folder / "packed.safetensors")
    names = ["model.onnx", *["same.png"] * 70, "none.png", "grey.png"]
    answers = list(predictor.answers([folder / name for name in names], top=2))
    assert [index for index, answer in enumerate(answers) if isinstance(answer, UserError)] == [0, 71]
    for index, name in ((1, "same.png"), (70, "same.png"), (72, "grey.png")):
        [alone] = predictor([folder / name], top=2)
        assert answers[index].path == str(folder / name)
        assert answers[index].classes == alone.classes
        assert answers[index].probabilities == pytest.approx(alone.probabilities, abs=1e-5)


@pytest.mark.parametrize("name", ["foreign.safetensors", "foreign.onnx"])
def test_foreign_files_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x08\x00\x00\x00 something else")
    with pytest.raises(UserError, match=rf"{name}: found a truncated file or none of the"):
        Predictor.read(tmp_path / name)
