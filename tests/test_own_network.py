"""docs/models.md from a class and pictures of one's own to small files, in five commands and in ten lines."""

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import Script

ROOT = Path(__file__).parents[1]
SECTION = (ROOT / "docs/models.md").read_text(encoding="utf-8").split("## Your own network\n")[1].split("\n## ")[0]
COMMANDS = textwrap.dedent(re.search(r"(?:^    .*\n)+", SECTION, re.MULTILINE)[0])
LINES = re.search(r"^```python\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)[1]
NETWORK = """
from torch import nn

class MyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8 * 49, 2)

    def forward(self, images):
        features = self.body(images).view(len(images), -1)
        return self.head(features), features
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    """`mynet.py`, the trained `mynet.pt`, `names.txt`, and in `pictures` some that are bright on one side."""
    (tmp_path / "mynet.py").write_text(NETWORK)
    (tmp_path / "names.txt").write_text("left\nright\n")
    (tmp_path / "pictures").mkdir()
    generator = torch.Generator().manual_seed(0)
    images = 90 * torch.rand(24, 32, 32, 3, generator=generator)
    for index, image in enumerate(images):
        half = slice(0, 16) if index % 2 == 0 else slice(16, 32)
        image[:, half] += 120
        path = tmp_path / "pictures" / f"{index:02}-{('left', 'right')[index % 2]}.png"
        Image.fromarray(image.byte().numpy()).save(path)
    namespace = {"__name__": "mynet"}
    exec(NETWORK, namespace)
    torch.manual_seed(0)
    network = namespace["MyNet"]()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    inputs, target = images.byte().permute(0, 3, 1, 2).contiguous() / 255, torch.arange(24) % 2
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(inputs)[0], target).backward()
        optimizer.step()
    torch.save(network.state_dict(), tmp_path / "mynet.pt")
    return tmp_path


def ran(folder, *command):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shell(folder, commands):
    """What the commands print, one a line; our scripts are run without waiting for a new interpreter's imports."""
    printed = ""
    for command in commands.replace("\\\n", "").splitlines():
        if not command.startswith("python "):
            printed += ran(folder, "bash", "-ec", command)
            continue
        script, *arguments = shlex.split(command)[1:]
        process = Script(ROOT / script, *arguments, folder=folder)
        output, problems = process.said()
        assert process.wait() == 0, problems
        printed += output
    return printed


def right(printed):
    """How many of the printed pictures are put into the class that their names say."""
    return sum(bool(re.match(r"pictures/\d\d-(\w+)\.png: \1 ", line)) for line in printed.splitlines())


def test_five_commands_lead_to_files_that_classify(folder):
    assert len(COMMANDS.replace("\\\n", "").strip().splitlines()) == 5
    assert right(shell(folder, COMMANDS)) == 2 * 24  # both files
    assert (folder / "net.safetensors").stat().st_size < (folder / "mynet.pt").stat().st_size


def test_ten_lines_of_python_lead_there_too(folder):
    lines = [line for line in LINES.splitlines() if line]
    assert len(lines) == 10
    check = "assert torch.equal(network(images), quantized.network(images)); print(about['class_names'])"
    printed = ran(folder, sys.executable, "-c", "\n".join([*lines, check]))
    assert printed.split()[:4] == ["layer", "bits", "error", "bytes"]
    assert printed.splitlines()[-1] == "['left', 'right']"
    predict = COMMANDS.strip().splitlines()[-2:]
    assert right(shell(folder, "\n".join(predict))) == 2 * 24
