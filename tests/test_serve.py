"""The page of `scripts/serve.py`: what it says of pictures and files, and the page itself in a real browser."""

import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from processes import Script
from starlette.testclient import TestClient
from torch import nn

import compress
from compress import models
from compress.data.image_file import MAX_PIXELS
from compress.errors import UserError
from compress.export.description import NetworkDescription
from compress.export.litert import LiteRt
from compress.export.onnx import Onnx
from compress.export.openvino import OpenVino
from compress.export.packed import write_float, write_packed
from compress.predict import Predictor
from compress.quantization import quantize
from compress.serve import answer, import_gradio, read_files, serve

SCRIPT = Path(__file__).parents[1] / "scripts" / "serve.py"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "${alert(3)}",
    "{{value}} \u202eabc",
    "a&b",
]
NAMES = [*HOSTILE, *(f"class {index}" for index in range(len(HOSTILE), 10))]
ABOUT = NetworkDescription(
    architecture={"stem": "resnet8", "options": {}, "num_classes": 10},
    class_names=NAMES,
    mean=[0.5, 0.4, 0.3],
    standard_deviation=[0.2, 0.25, 0.3],
    input_shape=(3, 16, 16),
)
FILES = ["float.safetensors", "packed.safetensors", "model.onnx", "model.openvino.onnx", "model.tflite"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Model files of one network in every format, pictures, and what is none."""
    directory = tmp_path_factory.mktemp("serve")
    torch.manual_seed(0)
    model = models.build("resnet8", 10).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(32, 3, 16, 16))
    quantized = quantize(model, [torch.randn(8, 3, 16, 16)], 4)
    write_float(directory / "float.safetensors", model.eval(), ABOUT)
    write_packed(directory / "packed.safetensors", quantized, ABOUT)
    Onnx().write(directory / "model.onnx", quantized, ABOUT)
    OpenVino().write(directory / "model.openvino.onnx", quantized, ABOUT)
    LiteRt().write(directory / "model.tflite", quantized, ABOUT)
    write_packed(directory / "others.safetensors", quantized, replace(ABOUT, class_names=NAMES[::-1]))
    write_packed(directory / "larger.safetensors", quantized, replace(ABOUT, input_shape=(3, 32, 32)))
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (40, 60, 3), np.uint8)).save(directory / "wide.jpg", quality=90)
    Image.fromarray(draw.integers(0, 256, (30, 20, 4), np.uint8)).save(directory / "clear.png")
    (directory / "<b>no picture.png").write_bytes((directory / "wide.jpg").read_bytes()[:200])
    Image.new("1", (12_000, 12_000)).save(directory / "bomb.png")
    Image.new("1", (20_000, 20_000)).save(directory / "larger bomb.png")
    assert MAX_PIXELS < 12_000**2
    return directory


def served(folder):
    return read_files([folder / name for name in FILES])


def likeliest(path, picture):
    """The three likeliest classes of the picture and their percentages, as the page writes them."""
    [found] = Predictor.read(path)([picture], top=3)
    return list(zip(found.classes, (f"{100 * value:.1f} %" for value in found.probabilities), strict=True))


def test_every_file_has_its_name_runtime_and_bytes(folder):
    found = served(folder)
    assert [file.name for file in found] == FILES
    assert [file.runtime for file in found] == ["torch", "torch", "onnxruntime", "openvino", "litert"]
    assert [file.bytes for file in found] == [(folder / name).stat().st_size for name in FILES]


def test_files_of_the_same_name_are_told_apart_by_their_paths(folder, tmp_path):
    shutil.copy(folder / "packed.safetensors", tmp_path)
    paths = [folder / "packed.safetensors", tmp_path / "packed.safetensors", folder / "float.safetensors"]
    assert [file.name for file in read_files(paths)] == [str(paths[0]), str(paths[1]), "float.safetensors"]


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

    def forward(self, images):
        return self.body(images)


def test_a_network_of_ones_own_class_is_for_the_files_that_take_one(folder, tmp_path):
    quantized = compress.quantize(Own(), torch.randn(16, 3, 32, 32), bits=4)
    paths = [tmp_path / "net.safetensors", tmp_path / "net.onnx"]
    quantized.save(paths[0], class_names=["left", "right"])
    quantized.export(paths[1], class_names=["left", "right"])
    _, table = answer(read_files(paths, Own), str(folder / "wide.jpg"))
    assert table.count("<b>left</b>") == table.count("<b>right</b>") == 2
    with pytest.raises(UserError, match=r"net\.safetensors: found a network of the class"):
        read_files(paths)
    with pytest.raises(UserError, match=r"^network: found it for .*net\.onnx; accepted: no network="):
        read_files(paths[1:], Own)


MISTAKES = [
    ("none.safetensors", "none.safetensors: found no such file"),
    ("wide.jpg", "wide.jpg: found no suffix of a model file"),
    ("others.safetensors", "others.safetensors: found other classes than in .*float.safetensors"),
    ("larger.safetensors", r"larger.safetensors: found other image sizes than in .* \(32 and 16\)"),
]


@pytest.mark.parametrize(("name", "message"), MISTAKES)
def test_a_file_that_cannot_stand_beside_the_others_is_refused(folder, name, message):
    with pytest.raises(UserError, match=message) as mistake:
        read_files([folder / "float.safetensors", folder / name])
    assert len(str(mistake.value).splitlines()) == 1


@pytest.mark.parametrize("picture", ["wide.jpg", "clear.png"])
def test_the_answers_are_those_of_predict(folder, picture):
    figures, table = answer(served(folder), str(folder / picture))
    assert figures.count("<img") == 2
    rows = table.split("<tr>")[2:]
    for name, row in zip(FILES, rows, strict=True):
        found = re.findall(r"<b>(.*?)</b><i>(.*?)</i>", row)
        expected = likeliest(folder / name, folder / picture)
        # Batches of another size may round otherwise.
        assert [float(percent[:-2]) for _, percent in found] == pytest.approx(
            [float(percent[:-2]) for _, percent in expected], abs=0.11
        )


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        ("<b>no picture.png", "cannot be read"),
        ("bomb.png", "12000 x 12000 pixels; accepted: up to 100,000,000"),
        ("larger bomb.png", "cannot be read"),
        ("float.safetensors", "cannot be read"),
    ],
)
def test_what_is_no_picture_is_a_line_that_names_the_file_alone(folder, picture, reason):
    line, table = answer(served(folder), str(folder / picture))
    assert line.startswith(f'<p class="problem" role="alert">{picture.replace("<b>", "&lt;b&gt;")}: ')
    assert reason in line
    assert str(folder) not in line
    assert 'class="bar"' not in table


def test_a_network_without_an_answer_is_a_line(folder, tmp_path):
    model = models.build("resnet8", 10).eval()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.finfo(torch.float32).max)
    write_float(tmp_path / "broken.safetensors", model, ABOUT)
    line, _ = answer(read_files([tmp_path / "broken.safetensors"]), str(folder / "wide.jpg"))
    assert line.startswith('<p class="problem"')
    assert "no numbers" in line


def test_text_from_files_stays_text(folder):
    files = served(folder)
    for picture in ("wide.jpg", "clear.png"):
        _, table = answer([replace(file, name=HOSTILE[0]) for file in files], str(folder / picture))
        assert HOSTILE[0] not in table
        assert HOSTILE[1] not in table
        assert "\u202e" not in table
        assert "&lt;img src=x" in table


def test_no_picture_leaves_the_files(folder):
    figures, table = answer(served(folder), None)
    assert figures == ""
    assert all(name in table for name in FILES)


def test_a_missing_package_is_named_with_the_extra(folder, uninstall):
    uninstall("gradio")
    with pytest.raises(UserError, match=r"^gradio is not installed; pip install 'compress\[demo\]'$"):
        serve([folder / "float.safetensors"], "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", -1, "--port: found -1; accepted: 0 to 65535"),
        ("127.0.0.1", 65536, "--port: found 65536; accepted: 0 to 65535"),
        ("192.0.2.1", 0, "--host, --port: found 192.0.2.1 and 0"),  # RFC 5737: for documentation, nobody's
        ("no host", 0, "--host, --port: found no host and 0"),
    ],
)
def test_an_address_that_cannot_be_had_is_one_line(folder, host, port, message):
    with pytest.raises(UserError) as mistake:
        serve([folder / "float.safetensors"], host, port)
    assert message in str(mistake.value)
    assert len(str(mistake.value).splitlines()) == 1


def test_a_port_that_is_taken_is_one_line(folder):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"--host, --port: found 127.0.0.1 and {port} \(.*; accepted: .* a free port"
        ):
            serve([folder / "float.safetensors"], "127.0.0.1", port)


@pytest.fixture
def client(folder, tmp_path, monkeypatch):
    """The page of one file, as a program asks it, that takes 10 kB and lets one picture wait."""
    monkeypatch.setattr(compress.serve, "MAX_UPLOAD", "10kb")
    monkeypatch.setattr(compress.serve, "WAITING", 1)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with TestClient(compress.serve.page(import_gradio(), read_files([folder / "float.safetensors"]))) as client:
        yield client


def test_a_picture_of_more_bytes_than_the_page_takes_is_refused_and_not_kept(client, tmp_path):
    def upload(count):
        return client.post("/gradio_api/upload", files={"files": ("picture.jpg", bytes(count))})

    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    refused = upload(20_000)
    assert (refused.status_code, refused.text) == (413, "File size exceeded maximum allowed size of 10240 bytes.")
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    [path] = upload(10_000).json()
    assert Path(path).stat().st_size == 10_000


def test_a_picture_is_refused_while_enough_others_wait(client, monkeypatch):
    answering, answered = threading.Event(), threading.Event()

    def wait(files, path):
        answering.set()
        answered.wait()
        return "", ""

    monkeypatch.setattr(compress.serve, "answer", wait)

    def ask(session):
        about = {"data": [None], "fn_index": 0, "session_hash": session}
        return client.post("/gradio_api/queue/join", json=about)

    try:
        assert ask("answered").status_code == 200
        answering.wait()
        assert ask("waiting").status_code == 200
        refused = ask("too many")
        assert refused.status_code == 503
        assert refused.json()["detail"].startswith("Queue is full.")
    finally:
        answered.set()


@pytest.mark.slow
def test_the_script_ends_with_status_2_and_one_line_on_a_mistake(folder, tmp_path):
    script = Script(SCRIPT, folder / "float.safetensors", folder / "none.onnx", "--port", 0, folder=tmp_path)
    out, error = script.said()
    assert (script.wait(), out, len(error.splitlines())) == (2, "", 1)
    assert error.startswith(f"error: {folder / 'none.onnx'}: found no such file")


@contextlib.contextmanager
def running(*arguments, temporary):
    """`scripts/serve.py` on a free port: the process and the address that it prints."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    )
    try:
        yield process, process.stdout.readline().split()[0]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    with running(*(folder / name for name in FILES), temporary=tmp_path_factory.mktemp("uploads")) as (_, address):
        yield address


@pytest.fixture(params=["light", "dark"])
def page(request, address):
    """The page in a window of that colour scheme; it must complain of nothing and ask no other host for anything."""
    complaints, requests = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=request.param)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda asked: requests.append(asked.url))
        page.goto(address)
        page.wait_for_selector("#answers table")
        assert page.evaluate("document.body.classList.contains('dark')") == (request.param == "dark")
        yield page
        browser.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []


def drop(page, path):
    """Drops the file on the page as a mouse does; the page must have no picture yet."""
    files = page.evaluate_handle(
        "([bytes, name]) => { const files = new DataTransfer(); "
        "files.items.add(new File([new Uint8Array(bytes)], name)); return files; }",
        [list(path.read_bytes()), path.name],
    )
    page.get_by_text("Drop File Here").dispatch_event("drop", {"dataTransfer": files})


def take_away(page):
    page.get_by_role("button", name="Clear", exact=True).click()
    page.wait_for_function("document.querySelectorAll('#pictures img, #pictures .problem').length === 0")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; Debian's package: chromium, or CHROMIUM=PATH")
def test_a_dropped_picture_shows_what_every_file_answers_its_size_and_milliseconds(folder, page):
    rows = page.locator("#answers tbody tr")
    assert rows.locator("th").all_text_contents() == [f"{file.name}{file.runtime}" for file in served(folder)]
    assert page.locator(".bar").count() == 0
    for picture in ("wide.jpg", "clear.png"):
        drop(page, folder / picture)
        page.wait_for_selector(".bar")
        assert page.locator("#pictures img").count() == 2
        for index, name in enumerate(FILES):
            row = rows.nth(index)
            [(first, percent), *_] = likeliest(folder / name, folder / picture)
            shown = float(row.locator(".bar i").first.text_content()[:-2])
            assert shown == pytest.approx(float(percent[:-2]), abs=0.11)
            assert row.locator(".bar b").first.text_content() == first.replace("\u202e", "\\u202e")
            _, kilobytes, _, milliseconds = row.locator("td").all_text_contents()
            assert kilobytes == f"{(folder / name).stat().st_size / 1e3:,.1f}"
            assert float(milliseconds) > 0
        take_away(page)
        page.wait_for_function("document.querySelectorAll('.bar').length === 0")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; Debian's package: chromium, or CHROMIUM=PATH")
def test_a_damaged_picture_and_one_of_too_many_pixels_are_lines_and_the_next_one_is_answered(folder, page):
    for picture in ("<b>no picture.png", "bomb.png", "larger bomb.png"):
        drop(page, folder / picture)
        page.wait_for_selector("#pictures .problem")
        assert "cannot be read" in page.locator(".problem").text_content()
        take_away(page)
    drop(page, folder / "wide.jpg")
    page.wait_for_selector(".bar")
    assert page.locator(".problem").count() == 0


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; Debian's package: chromium, or CHROMIUM=PATH")
@pytest.mark.parametrize("width", [1280, 800, 400])
def test_nothing_sticks_out_sideways(folder, page, width):
    drop(page, folder / "wide.jpg")
    page.wait_for_selector(".bar")
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") == width


def has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_address_of_ipv6_has_its_brackets_in_the_url_or_is_refused_where_there_is_none(folder, tmp_path, host):
    if not has_ipv6():
        with pytest.raises(UserError, match="found ::1 and 0 "):
            serve([folder / "float.safetensors"], host, 0)
        return
    with running(folder / "float.safetensors", "--host", host, temporary=tmp_path) as (_, address):
        assert re.fullmatch(r"http://\[::1\]:\d+/", address)
        assert b"float.safetensors" in urlopen(address).read()


def test_a_kind_of_address_that_the_machine_does_not_have_is_one_line(folder, monkeypatch):
    class Without(socket.socket):
        def __init__(self, family):
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
            super().__init__(family)

    monkeypatch.setattr(socket, "socket", Without)
    with pytest.raises(UserError, match=r"found ::1 and 0 \(Address family not supported"):
        serve([folder / "float.safetensors"], "::1", 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_its_uploads(folder, tmp_path, number):
    with running(folder / "float.safetensors", temporary=tmp_path) as (process, address):
        assert b"float.safetensors" in urlopen(address).read()
        assert list(tmp_path.glob("compress-serve-*"))
        process.send_signal(number)
        assert (process.wait(), process.stdout.read()) == (0, "stopped\n")
    assert not list(tmp_path.glob("compress-serve-*"))
