"""The steps of the Dockerfile, done in a clean virtual environment, since not every machine has what builds images."""

import json
import os
import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text()).splitlines()


def instructions(word):
    return [line.removeprefix(word).strip() for line in STEPS if line.startswith(f"{word} ")]


def ignored():
    """What .dockerignore lets through."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    return {line.removeprefix("!") for line in lines if line.startswith("!")}


@pytest.mark.slow
def test_the_image_has_the_command_line_and_its_configuration(tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    [site] = (tmp_path / "venv").glob("lib/python*/site-packages")
    # What is installed here already, such as PyTorch, need not be fetched again.
    (site / "here.pth").write_text(sysconfig.get_path("purelib"))
    app = tmp_path / "app"
    app.mkdir()
    arguments = dict(line.split("=", 1) for line in instructions("ARG"))
    environment = {key: value.strip('"') for key, value in arguments.items()} | {
        "HOME": str(tmp_path),
        "PYTHONPATH": "",
    }
    environment["PATH"] = f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}"
    options = {"cwd": app, "env": {**os.environ, **environment}, "capture_output": True, "text": True}

    for line in STEPS:
        word, _, rest = line.partition(" ")
        if word == "COPY":
            *sources, target = rest.split()
            assert set(sources) <= ignored()
            for source in sources:
                place = app / (source if target == "./" else target)
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place, dirs_exist_ok=True)
                else:
                    shutil.copy(ROOT / source, place)
        # Users are the machine's, not an environment's.
        if word == "RUN" and not rest.startswith("useradd"):
            done = subprocess.run(["sh", "-euc", rest], **options)
            assert done.returncode == 0, done.stderr

    [entry] = instructions("ENTRYPOINT")
    command = [part.replace("/app", str(app)) for part in json.loads(entry)]
    outside = tmp_path / "work"
    outside.mkdir()
    shown = subprocess.run([*command, "--cfg", "job"], **{**options, "cwd": outside})
    assert shown.returncode == 0, shown.stderr
    assert "compress.methods" in shown.stdout
    found = subprocess.run(["python", "-c", "import compress; print(compress.__file__)"], **{**options, "cwd": outside})
    assert Path(found.stdout.strip()).is_relative_to(site)


def test_the_image_runs_as_nobody_with_rights():
    assert instructions("USER") == ["1000"]
