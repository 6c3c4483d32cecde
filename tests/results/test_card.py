"""The model card and publishing: what the card says was measured, and its lines run what lies beside it."""

import base64
import json
import re
import shutil
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import compress
from compress.benchmarks.synthetic import write_runs
from compress.checksums import file_digest
from compress.data.cifar import CIFAR10, CIFAR100
from compress.data.fashion_mnist import FashionMNIST
from compress.errors import UserError
from compress.models.pretrained import published
from compress.predict import Predictor
from compress.results.card import model_card
from compress.results.publish import publish
from compress.results.record import Record


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a finished run with files for every runtime."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as place:
        place.chdir(folder)
        result = compress.run(
            [
                *("method=kd", "student=resnet8", "teacher=resnet8", "teacher.training.epochs=1"),
                *("trainer.max_epochs=2", "data.limit=200", "export=[onnx,openvino,executorch,litert]"),
                *("quantizer.bits=[8]", "quantizer.activation_bits=8", "quantizer.calibration_images=32"),
            ]
        )
        return folder / result.directory


def cells(text):
    """The cells of the first table in `text`, by the name of the variant and the heading."""
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    end = next(index for index, line in enumerate(table) if line[0] == "file")
    head, _, *lines = table[:end]
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


@pytest.mark.slow
def test_the_card_of_a_run_has_its_rows_and_the_metadata_of_the_hub(run):
    record = Record.read(run / "result.json")
    text = (run / "README.md").read_text()
    assert record.files["README.md"] == file_digest(run / "README.md")
    table = cells(text)
    assert list(table) == [row.name for row in record.rows]
    for row in record.rows:
        assert table[row.name]["test %"] == f"{100 * row.test_accuracy:.2f}"
        assert table[row.name]["size kB"] == f"{row.bytes / 1000:.1f}"
        assert table[row.name]["file"] == f"[{Path(row.file).name}]({row.file})"
        assert f"| {row.file} | {file_digest(run / row.file)} |" in text
    card = ModelCard(text)
    [*results] = card.data.eval_results
    assert [result.metric_value for result in results] == [row.test_accuracy for row in record.rows]
    assert {result.task_type for result in results} == {card.data.pipeline_tag} == {"image-classification"}
    runtimes = {"onnxruntime", "openvino", "executorch", "litert", "torch"}
    assert {"distillation", "quantization", *runtimes} <= set(card.data.tags)
    assert "license" not in yaml.safe_load(text.split("---")[1])
    assert "- the images, Digits: CC BY 4.0" in text
    assert "- teacher: resnet8, right for " in text


@pytest.mark.slow
def test_the_lines_of_the_card_give_the_logits_that_were_measured(run, monkeypatch):
    """In each runtime, of images normalised as the card says."""
    text = (run / "README.md").read_text()
    monkeypatch.chdir(run)
    mean, deviation = (
        np.array([float(value) for value in re.search(rf"{before} ([\d. ]+?)(?: of|\.\n)", text)[1].split()])
        for before in ("the means", "their deviations")
    )
    pictures = np.random.default_rng(0).random((2, 3, 8, 8))
    images = ((pictures - mean[:, None, None]) / deviation[:, None, None]).astype(np.float32)
    blocks = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert len(blocks) == 5
    for lines in blocks:
        names = {"images": images}
        exec(lines, names)
        [file] = re.findall(r"'(models/[^']+)'", lines)
        with torch.no_grad():
            expected = Predictor.read(file).model(torch.from_numpy(images))
        torch.testing.assert_close(torch.as_tensor(names["logits"]).detach(), expected)


@pytest.mark.slow
def test_a_published_variant_is_one_that_was_chosen_with_a_card_of_its_own(run, tmp_path):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    target = tmp_path / "new" / "digits"
    where, files = publish(run, str(target), ["gpfq 8 bit a8 onnxruntime"], "apache-2.0")
    assert where == str(target)
    [packed] = [row for row in Record.read(run / "result.json").rows if row.name == "gpfq 8 bit a8 onnxruntime"]
    name = Path(packed.file).name
    assert sorted(path.name for path in target.iterdir()) == sorted(path.name for path in files) == ["README.md", name]
    assert file_digest(target / name) == file_digest(run / packed.file)
    text = (target / "README.md").read_text()
    # The float32 student, which the other is compared with, has a row and no file.
    assert [table["file"] for table in cells(text).values()] == ["", f"[{name}]({name})"]
    assert [result.metric_value for result in ModelCard(text).data.eval_results] == [packed.test_accuracy]
    assert ModelCard(text).data.license == "apache-2.0"
    assert "- these weights: apache-2.0" in text
    (tmp_path / "empty").mkdir()
    publish(run, str(tmp_path / "empty"))
    published = {path.name for path in (tmp_path / "empty").iterdir()}
    assert published == {"README.md", *(path.name for path in (run / "models").iterdir())}
    assert {"student-fp32.pte", "student-fp32.pte.json"} < published
    Predictor.read(tmp_path / "empty" / "student-gpfq-8bit-a8.pte")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_what_cannot_be_published_is_refused_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    content = bytearray((damaged / "models" / "student-fp32.onnx").read_bytes())
    content[1000] ^= 1
    (damaged / "models" / "student-fp32.onnx").write_bytes(content)
    (damaged / "models" / "student-fp32.safetensors").unlink()
    target = tmp_path / "target"
    for arguments, message in [
        ((run, str(run)), r"--to: found .*, which is not empty; accepted: a new or an empty directory"),
        ((tmp_path, str(target)), r"found no result\.json; accepted: the directory of a finished run"),
        ((run, str(target), ["fp16"]), r"--variants: found 'fp16'; accepted: fp32, "),
        ((run, str(target), [], "My Licence"), r"--licence: found 'My Licence'; accepted: a name of the Hub"),
        ((run, str(target), [], None, True), r"--private: found it for a directory; accepted: --to hf:OWNER/NAME"),
        ((run, "hf:me"), r"--to: found 'hf:me'; accepted: hf:OWNER/NAME"),
        ((run, "hf:me/digits"), r"--to: found no token of the Hub; accepted: one from `hf auth login`, or in HF_TOKEN"),
        ((damaged, str(target), ["fp32 onnxruntime"]), r"student-fp32\.onnx: found content that is not what the run"),
        ((damaged, str(target), ["fp32"]), r"student-fp32\.safetensors: found no such file, which the run left"),
    ]:
        with pytest.raises(UserError, match=message) as mistake:
            publish(*arguments)
        assert "\n" not in str(mistake.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


@contextmanager
def hub(token, requests):
    """A server that speaks as much of the Hub's protocol as an upload takes; `requests` gets what it was asked."""

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append((self.path, body))
            content = [json.loads(line) for line in body.splitlines()]
            allowed = self.headers["Authorization"] == f"Bearer {token}"
            answer = {"url": f"http://{self.headers['Host']}/me/digits"}
            if self.path.endswith("/preupload/main"):
                answer = {
                    "files": [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for file in content[0]["files"]
                    ]
                }
            elif "/commit/" in self.path:
                answer = {"commitUrl": f"{answer['url']}/commit/1", "commitOid": "1", "hookOutput": ""}
            text = json.dumps(answer if allowed else {"error": "Invalid token"}).encode()
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.mark.slow
def test_a_repository_of_the_hub_gets_the_files_and_their_card(run, monkeypatch):
    """By the Hub's own client."""
    requests = []
    with hub("hf_right", requests) as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        where, _ = publish(run, "hf:me/digits", ["gpfq 8 bit a8"], private=True)
        assert where == f"{address}/me/digits"
        path, body = requests[0]
        assert path == "/api/repos/create"
        asked = json.loads(body)
        assert {"name": "digits", "organization": "me"}.items() <= asked.items()
        assert asked.get("visibility") == "private" or asked["private"]  # before version 2 of the client
        path, body = requests[-1]
        assert path == "/api/models/me/digits/commit/main"
        sent = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in map(json.loads, body.splitlines())
            if line["key"] == "file"
        }
        file = "student-gpfq-8bit-a8.safetensors"
        assert sorted(sent) == ["README.md", file]
        assert sent[file] == (run / "models" / file).read_bytes()
        assert b"compress.load('student-gpfq-8bit-a8.safetensors')" in sent["README.md"]
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(
            UserError, match=r"^--to: me/digits cannot be written \(.*401.*\); accepted: a repository of "
        ):
            publish(run, "hf:me/digits")


def test_names_from_a_run_are_text_in_its_card(tmp_path):
    [directory] = write_runs(tmp_path, 1, epochs=1, layers=3)
    record = Record.read(directory / "result.json")
    names = ["<script>", "[a](b)", "| c |", "```", "a\nb"]
    data = record.data.model_copy(update={"name": "x\n---\ny: 1", "class_names": names, "hub_name": "o/n\n---"})
    odd = record.model_copy(update={"data": data, "overrides": ["data.root=a\n```\n# b", "$(rm)"]})
    text = model_card(odd, {row.file: "0" * 64 for row in odd.rows})
    assert r"\<script\>, \[a\](b), \| c \|, \`\`\`, a b" in text
    assert not re.search(r"^(# b|```$\n# b|y: 1|<script>)", text, re.MULTILINE)
    metadata = yaml.safe_load(text[: text.index("\n---\n\n#")])
    assert metadata["datasets"] == ["o/n\n---"]
    assert ModelCard(text).data.pipeline_tag == "image-classification"


def test_a_card_says_nothing_of_what_was_not_measured(tmp_path):
    """Images without labels have no accuracy, and a run that kept no files has nothing to load."""
    [directory] = write_runs(tmp_path, 1, epochs=1, layers=3)
    record = json.loads((directory / "result.json").read_text())
    for row in record["tradeoff"]:
        row |= {"validation_accuracy": None, "test_accuracy": None}
    text = model_card(Record.model_validate(record), {})
    [*lines] = cells(text + "\n| file |").values()
    assert len(lines) == 1
    assert "test %" not in lines[0]
    assert "Accuracies" not in text
    assert "The run kept no model files." in text
    assert "model-index" not in text
    assert "not known" in text


def test_a_class_of_the_users_own_is_given_where_a_file_needs_it(tmp_path):
    [directory] = write_runs(tmp_path, 1, epochs=1, layers=3)
    record = Record.read(directory / "result.json")
    student = record.student.model_copy(update={"model": "my_networks.Small", "own_class": True})
    rows = record.rows[:2]
    own = record.model_copy(update={"student": student, "rows": rows})
    text = model_card(own, {row.file: "0" * 64 for row in rows})
    file = rows[-1].file
    assert f"predict.py {file} picture.png network=my_networks.Small\n" in text
    assert "from my_networks import Small\nimport compress, torch\n" in text
    assert f"compress.load({file!r}, network=Small)" in text
    odd = student.model_copy(update={"model": "a b.c; d"})
    assert "from a b" not in model_card(own.model_copy(update={"student": odd}), {row.file: "0" * 64 for row in rows})


def test_data_sets_with_a_licence_say_so():
    assert FashionMNIST.licence == "MIT"
    assert CIFAR10.licence is None  # none is stated
    assert (CIFAR10.hub_name, CIFAR100.hub_name) == ("uoft-cs/cifar10", "uoft-cs/cifar100")


def test_published_weights_are_named_with_their_licence(tmp_path):
    """As timm lists it."""
    weights = published({"stem": "timm", "name": "resnet18"}, "a1_in1k", "student.pretrained")
    [directory] = write_runs(tmp_path, 1, epochs=1, layers=3)
    record = Record.read(directory / "result.json")
    about = {"weights": "resnet18 a1_in1k", "licence": weights.licence}
    text = model_card(record.model_copy(update={"student": record.student.model_copy(update=about)}), {})
    assert r"- the weights that they began as, resnet18 a1\_in1k: apache-2.0" in text
