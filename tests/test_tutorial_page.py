"""docs/tutorial.md and README.md from pictures to files that classify them, with fewer pictures and epochs."""

import os
import re
import shlex
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from processes import Script

ROOT = Path(__file__).parents[1]
PAGE = (
    (ROOT / "docs/tutorial.md")
    .read_text(encoding="utf-8")
    .replace('("train", 160), ("test", 40)', '("train", 40), ("test", 10)')
)
PAGE = re.sub(r"(max_epochs|training\.epochs)=\d+", r"\1=1", PAGE)
FENCED = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = FENCED.findall(PAGE)
README = FENCED.findall((ROOT / "README.md").read_text(encoding="utf-8"))

pytestmark = pytest.mark.slow


def shell(folder, line):
    """What a command prints; our scripts are run without waiting for a new interpreter's imports."""
    words = shlex.split(line)
    if words[0] != "python":
        subprocess.run(["bash", "-ec", line], cwd=folder, check=True)
        return ""
    found = [[str(path.relative_to(folder)) for path in folder.glob(word)] if "*" in word else [word] for word in words]
    _, script, *rest = chain.from_iterable(found)
    process = Script(ROOT / script, *rest, folder=folder)
    output, problems = process.said()
    assert process.wait() == 0, problems
    return output


def python(folder, text):
    """What a new interpreter prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", text]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def commands(text):
    return text.replace("\\\n", "").splitlines()


def test_every_command_does_what_the_page_says(tmp_path):
    printed = []
    for language, text in BLOCKS:
        if language == "python":
            printed.append(python(tmp_path, text))
        else:
            printed += [shell(tmp_path, line) for line in commands(text)]
    draw, dry, train, predicted, in_python, budget, _, _, elsewhere, verified, reported = printed
    assert not draw
    assert "resnet8" in dry
    assert "gpfq 4 bit" in train
    assert len(re.findall(r"circle-\d+\.jpg", predicted)) == 10
    assert re.match(r"\('(circle|square|triangle)',\) ", in_python)
    assert "gpfq" in budget
    [small] = (tmp_path / "outputs/small/quantized").glob("*/models/student-gpfq-*.safetensors")
    assert small.stat().st_size <= 20_000
    assert len(re.findall(r"square-\d+\.jpg", elsewhere)) == 10
    assert verified
    assert reported.startswith("3 runs")
    assert "shapes" in (tmp_path / "outputs/report.html").read_text(encoding="utf-8")


def test_the_project_of_the_readme_is_one(tmp_path):
    [(_, typed), (_, lines)] = README
    drawing = BLOCKS[0][1]
    python(tmp_path, drawing)
    (tmp_path / "pictures/test/circle/circle-000.jpg").rename(tmp_path / "photo.jpg")
    shorter = [
        "trainer.max_epochs=1",
        "teacher.training.epochs=1",
        "quantizer.bits=4",
        "quantizer.calibration_images=16",
    ]
    typed = re.sub(r"trainer\.max_epochs=\d+", " ".join(shorter), typed)
    typed = typed.replace("quantizer.budget", f"{shorter[-1]} quantizer.budget")
    dry, train, budget, predicted, reported = (shell(tmp_path, line) for line in commands(typed))
    assert "resnet8" in dry
    assert "gpfq 4 bit" in train
    assert "gpfq" in budget
    assert re.match(r"photo\.jpg: (circle|square|triangle) ", predicted)
    assert reported.startswith("2 runs")

    lines = lines.replace("trainer.max_epochs=30", " ".join(shorter))
    assert re.search(r"\[Prediction\(path='photo\.jpg', classes=\(", python(tmp_path, lines))
    assert (tmp_path / "outputs/small.safetensors").stat().st_size < 30_000
    answer = shell(tmp_path, "python scripts/predict.py outputs/small.safetensors photo.jpg")
    assert re.match(r"photo\.jpg: (circle|square|triangle) ", answer)
