"""Whatever a file holds, a command that reads it says so in a line or answers: no traceback, no endless cost."""

import gzip
import os
import random
import resource
import runpy
import shutil
import struct
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from faults import stopped_in_the_second_epoch
from mutations import mutate
from PIL import Image
from processes import PROCESSES
from safetensors.torch import save_file

import compress
from compress.cli import main
from compress.errors import UserError
from compress.export.packed import read_model
from compress.models import build

SCRIPTS = Path(__file__).parents[1] / "scripts"
TRAINED = [
    *("student=resnet8", "data.limit=100", "data.batch_size=32", "trainer.max_epochs=2", "trainer.log_every=0"),
]
SHORT = [*TRAINED, "quantizer.calibration_images=16", "quantizer.bits=[4]"]
RUN = [*SHORT, "method=kd", "teacher=resnet8", "teacher.training.epochs=1"]
INTEGERS = ["quantizer.bits=[8]", "quantizer.activation_bits=8", "export=[onnx,openvino,executorch,litert]"]
BEGUN, DONE = "outputs/runs/begun", "outputs/runs/done"
QUANTIZED = f"{DONE}/models/student-gpfq-8bit-a8"
MODEL, PROGRAM = f"{QUANTIZED}.safetensors", f"{QUANTIZED}.pte"
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
QUANTIZE = ("quantize.py", "model=resnet8", "quantizer.bits=[4]", "quantizer.calibration_images=16", "data.limit=100")
DRY = ("run.py", "--dry-run", *SHORT, "method=supervised")
SMALL = ("data.limit=null", "data.image_size=8", "data.validation_fraction=0.25")

# What reads files: (the files to change, the command).
READERS = {
    "resumed run": (f"{BEGUN}/*.*", ("run.py", f"resume={BEGUN}")),
    "resumed checkpoint": (f"{BEGUN}/checkpoints/*", ("run.py", f"resume={BEGUN}")),
    "verified run": (f"{DONE}/**/*.*", ("run.py", "--verify", DONE)),
    "teacher": ("outputs/teachers/*.safetensors", ("run.py", *RUN)),
    "student's checkpoint": (f"{DONE}/checkpoints/*", (*DRY, f"student.checkpoint={DONE}/checkpoints/best.ckpt")),
    "report": (f"{DONE}/*.*", ("report.py", "outputs", "-o", "report.html", "-o", "report.csv")),
    "sweep": ("outputs/sweep/**/*.yaml", ("run.py", "sweep=outputs/sweep")),
    "search": ("outputs/search/*.*", ("search.py", "space.yaml", "outputs/search", "--trials", "1")),
    "space": ("space.yaml", ("search.py", "space.yaml", "outputs/other", "--trials", "1")),
    "packed model": (MODEL, ("predict.py", MODEL, "pictures/zero/0.png")),
    "ONNX model": (f"{QUANTIZED}.onnx", ("predict.py", f"{QUANTIZED}.onnx", "pictures")),
    "OpenVINO model": (f"{QUANTIZED}.openvino.onnx", ("predict.py", f"{QUANTIZED}.openvino.onnx", "pictures")),
    "program of ExecuTorch": (f"{PROGRAM}*", ("predict.py", PROGRAM, "pictures")),
    "LiteRT model": (f"{QUANTIZED}.tflite", ("predict.py", f"{QUANTIZED}.tflite", "pictures")),
    "quantized model": (
        f"{DONE}/models/student-fp32.safetensors",
        (*QUANTIZE, f"checkpoint={DONE}/models/student-fp32.safetensors"),
    ),
    "foreign checkpoint": ("foreign.pth", (*QUANTIZE, "checkpoint=foreign.pth")),
    "foreign safetensors": ("foreign.safetensors", (*QUANTIZE, "checkpoint=foreign.safetensors")),
    "picture": ("pictures/**/*.*", ("predict.py", MODEL, "pictures")),
    "folder": ("images/**/*.*", (*DRY, "data=folder", "data.root=images", *SMALL)),
    "Fashion-MNIST": ("fashion/*.gz", (*DRY, "data=fashion_mnist", "data.root=fashion")),
    "parquet": ("pets/data/*.parquet", (*DRY, "data=huggingface", "data.root=pets", *SMALL)),
    "class names": (
        "names.txt",
        (
            *QUANTIZE,
            "checkpoint=foreign.pth",
            "data=folder",
            "data.root=images/test",
            "data.image_size=8",
            "data.class_names=names.txt",
        ),
    ),
    "class map": (
        "classes.json",
        (*DRY, "method=kd", "teacher=resnet8", "teacher.classes=classes.json", "teacher.checkpoint=foreign.pth"),
    ),
    "own YAML": ("own/**/*.yaml", (*DRY, "--config-dir", "own", "student=mine")),
}


def command(words, folder, told):
    """In a process of its own: a script in `folder`; `told` gets its memory in bytes and its processor seconds."""
    os.chdir(folder)
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
    sys.argv = [str(SCRIPTS / words[0]), *words[1:]]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    used = resource.getrusage(resource.RUSAGE_SELF)
    told.send((1024 * used.ru_maxrss, used.ru_utime + used.ru_stime))
    sys.exit(code)


def run(words, folder):
    """(exit code, lines on stderr, bytes of memory, seconds on the processor) of a script."""
    receive, send = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=command, args=(words, folder, send))
    process.start()
    process.join()
    cost = receive.recv() if receive.poll() else (0, 0.0)
    errors = (folder / "stderr").read_text(errors="replace").splitlines()
    # The library of data sets shows how far it is.
    errors = [line for line in errors if line.strip() and "examples/s" not in line]
    return process.exitcode, errors, *cost


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with every file that a reader of READERS takes."""
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        with stopped_in_the_second_epoch():
            assert main([*RUN, "logger=csv", f"hydra.run.dir={BEGUN}"]) == 2
        assert main([*SHORT, *INTEGERS, "method=supervised", "logger=csv", f"hydra.run.dir={DONE}"]) == 0
        sweep = ["-m", *TRAINED, "method=supervised", "quantizer=none", "seed=1,2"]
        assert main([*sweep, "hydra.sweep.dir=outputs/sweep"]) == 0
        write_pictures()
        write_others()
        assert run(("search.py", "space.yaml", "outputs/search", "--trials", "1"), folder)[0] == 0
    return folder


def write_pictures():
    draw = np.random.default_rng(0)
    endings = [".png", ".jpg", ".gif", ".webp", ".tiff", ".bmp", ".avif"]
    for split, count in (("pictures", 1), ("images/train", 4), ("images/test", 2)):
        for number, name in enumerate(NAMES):
            Path(split, name).mkdir(parents=True)
            for index in range(count):
                ending = endings[(number + index) % len(endings)]
                values = draw.integers(0, 256, (12, 9, 3), np.uint8)
                Image.fromarray(values).save(f"{split}/{name}/{index}{ending}")
    Path("fashion").mkdir()
    for name, count in (("train", 200), ("t10k", 20)):
        images, labels = draw.integers(0, 256, (count, 28, 28), np.uint8), (np.arange(count) % 10).astype(np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            Path(f"fashion/{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    Path("pets/data").mkdir(parents=True)
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    for split, count in (("train", 40), ("test", 20)):
        pictures = [Image.fromarray(draw.integers(0, 256, (9, 9, 3), np.uint8)) for _ in range(count)]
        rows = datasets.Dataset.from_dict({"image": pictures, "label": [i % 10 for i in range(count)]}, features=kinds)
        rows.to_parquet(f"pets/data/{split}-00000-of-00001.parquet")


def write_others():
    network = build("resnet8", 10)
    torch.save({"state_dict": network.state_dict(), "epoch": 3, "name": "mine"}, "foreign.pth")
    save_file(network.state_dict(), "foreign.safetensors")
    Path("names.txt").write_text("\n".join(NAMES) + "\n")
    Path("classes.json").write_text("{" + ", ".join(f'"{i}": {i}' for i in range(10)) + "}\n")
    Path("own/model").mkdir(parents=True)
    text = (compress.paths.CONF / "model/resnet8.yaml").read_text()
    Path("own/model/mine.yaml").write_text(text)
    overrides = ", ".join([*TRAINED, "quantizer=none"])
    Path("space.yaml").write_text(f"overrides: [{overrides}]\nspace:\n  optimizer.lr: {{low: 1e-3, high: 1e-2}}\n")


def mutated(files, folder, name, seed):
    """(exit code, memory, seconds) of one reader with one of its files changed; it has to end as it should."""
    pattern, words = READERS[name]
    draw = random.Random(seed)
    shutil.copytree(files, folder)
    # A lock is empty, and what a picture of a run holds is never read.
    chosen = [path for path in sorted(folder.glob(pattern)) if path.is_file() and path.stat().st_size]
    chosen = [path for path in chosen if path.parent != folder / DONE or path.suffix != ".png"]
    path = draw.choice(chosen)
    how = mutate(path, draw)
    code, errors, memory, seconds = run(words, folder)
    about = name, seed, path.relative_to(folder).as_posix(), how, code, errors
    assert code in (0, 1, 2), about
    assert not any("Traceback" in line for line in errors), about
    if code == 2:
        assert errors[-1].startswith("error: "), about
        assert len(errors) == 1 or all(line.startswith("error: ") for line in errors), about
    assert memory < 2e9, about
    shutil.rmtree(folder)
    return code, memory, seconds


@pytest.mark.soak
@pytest.mark.parametrize("name", READERS)
def test_an_unchanged_file_is_read(files, tmp_path, name):
    shutil.copytree(files, tmp_path / "files")
    code, errors, memory, _ = run(READERS[name][1], tmp_path / "files")
    assert code == 0, errors
    assert all(line.startswith("note: ") for line in errors), errors
    assert memory < 2e9


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_changed_file_is_refused_in_a_line_or_read(files, tmp_path, name):
    mutated(files, tmp_path / "files", name, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("name", READERS)
def test_25_changed_files_are_refused_in_a_line_or_read(files, tmp_path, name):
    costs = [mutated(files, tmp_path / str(seed), name, seed) for seed in range(1, 26)]
    refused = sum(code != 0 for code, _, _ in costs)
    most = [max(values) for values in zip(*costs, strict=True)][1:]
    print(f"{name}: {refused} of 25 refused; at most {most[0] / 1e9:.2f} GB and {most[1]:.1f} s")


def read_changed(path, count, told):
    """In a process of its own: reads `count` files like that at `path`, each changed, and tells what came of it."""
    intact, draw = path.read_bytes(), random.Random(0)
    refusals, costs = [], []
    for _ in range(count):
        path.write_bytes(intact)
        how = mutate(path, draw)
        started = time.process_time()
        try:
            read_model(path)
        except UserError as error:
            refusals.append((how, str(error)))
        costs.append(time.process_time() - started)
    told.send((refusals, max(costs), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


@pytest.mark.soak
def test_300_changed_packed_files_are_refused_in_a_line_or_read(files, tmp_path):
    path = tmp_path / "model.safetensors"
    shutil.copy(files / MODEL, path)
    receive, send = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=read_changed, args=(path, 300, send))
    process.start()
    send.close()  # so that a process that ends without a word is no endless wait
    refusals, longest, memory = receive.recv()
    process.join()
    print(f"{len(refusals)} of 300 refused; at most {memory / 1e9:.2f} GB and {longest:.1f} s")
    assert all(error.startswith(f"{path}: ") and "\n" not in error for _, error in refusals), refusals
    # What has no checksum that fits is refused, whatever it is.
    assert len({how for how, _ in refusals}) == 2
    assert longest < 100
    assert memory < 2e9
