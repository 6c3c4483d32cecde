"""docs/tutorial.md from pictures to files that classify them: every command, with fewer pictures and epochs."""

import os
import re
import shlex
import subprocess
import sys
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
BLOCKS = re.findall(r"^```(python|sh)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.slow


def shell(folder, line):
    """What a command prints; our scripts are run without waiting for a new interpreter's imports."""
    words = shlex.split(line)
    if words[0] != "python":
        subprocess.run(["bash", "-ec", line], cwd=folder, check=True)
        return ""
    process = Script(ROOT / words[1], *words[2:], folder=folder)
    output, problems = process.said()
    assert process.wait() == 0, problems
    return output


def test_every_command_does_what_the_page_says(tmp_path):
    printed = []
    for language, text in BLOCKS:
        if language == "python":
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-c", text]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
            printed.append(done.stdout)
        else:
            printed += [shell(tmp_path, line) for line in text.replace("\\\n", "").splitlines()]
    draw, dry, train, predicted, in_python, budget, _, _, elsewhere, verified, reported = printed
    assert not draw
    assert "resnet8" in dry
    assert "gpfq 4 bit" in train
    assert len(re.findall(r"circle-\d+\.jpg", predicted)) == 10
    assert re.match(r"\('(circle|square|triangle)',\) ", in_python)
    assert "gpfq" in budget
    [small] = (tmp_path / "small/quantized").glob("*/models/student-gpfq-*.safetensors")
    assert small.stat().st_size <= 20_000
    assert len(re.findall(r"square-\d+\.jpg", elsewhere)) == 10
    assert verified
    assert reported.startswith("1 run")
    assert "shapes" in (tmp_path / "report.html").read_text(encoding="utf-8")
