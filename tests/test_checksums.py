"""One changed bit of what is written and read again: the file is refused, or says what it said."""

import csv
import json
import random

import pytest
import torch
import yaml

from compress.checksums import check_archive, read_text
from compress.errors import UserError
from compress.export import container
from compress.files import read_json, write_json, write_yaml
from compress.results.metrics_csv import MetricsCSV

CONTENT = {
    "overrides": ["method=kd", "seed=1"],
    "started": "2026-07-01T09:00:00+02:00",
    "nested": {"lr": 1e-3, "no": None},
}
TENSORS = {f"layer{index}.weight": torch.arange(100.0).reshape(10, 10) + index for index in range(6)}


def flipped(path, seed, count):
    """Writes `count` versions of the file, each with another bit changed, and at last its own."""
    content = path.read_bytes()
    draw = random.Random(seed)
    for _ in range(count):
        place = draw.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        yield
    path.write_bytes(content)


def refusals(path, read, expected, count=300):
    """How many of `count` versions are refused; the others have to be read as the undamaged file is."""
    found = 0
    for _ in flipped(path, 0, count):
        try:
            content = read(path)
        except UserError:
            found += 1
        else:
            assert same(content, expected)
    assert same(read(path), expected)
    return found


def same(found, expected):
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, tuple):
        return all(map(same, found, expected))
    return found == expected


def test_a_bit_of_a_json_file(tmp_path):
    path = tmp_path / "started.json"
    write_json(path, CONTENT)
    assert json.loads(path.read_text()) == {"sha256": json.loads(path.read_text())["sha256"], **CONTENT}

    def read(path):
        content = read_json(path, "to remove it")
        # Where a bit of the word sha256 itself was changed, what stands behind it is a further entry.
        return {key: value for key, value in content.items() if key in CONTENT or len(str(value)) != 64}

    assert refusals(path, read, CONTENT) > 200


@pytest.mark.parametrize("options", [{}, {"indent": 4}, {"indent": 2, "sort_keys": True}])
def test_a_json_file_on_other_lines_is_not_taken_as_checked(tmp_path, options):
    path = tmp_path / "started.json"
    write_json(path, CONTENT)
    path.write_text(json.dumps(json.loads(path.read_text()), **options))
    with pytest.raises(UserError, match=r"started\.json: cannot be read \(its content does not match its checksum\)"):
        read_json(path, "to remove it")


@pytest.mark.parametrize("change", [lambda text: f"# mine\n{text}", lambda text: text.replace("\n", "\r\n")])
def test_nor_is_a_yaml_file(tmp_path, change):
    path = tmp_path / "sweep.yaml"
    write_yaml(path, yaml.safe_dump(CONTENT))
    path.write_bytes(change(path.read_text()).encode())
    with pytest.raises(UserError, match=r"sweep\.yaml: cannot be read \(its content does not match its checksum\)"):
        read_text(path)


def test_a_bit_of_a_yaml_file(tmp_path):
    path = tmp_path / "sweep.yaml"
    write_yaml(path, yaml.safe_dump(CONTENT))

    def read(path):
        try:
            content = yaml.safe_load(read_text(path))
        except (yaml.YAMLError, UnicodeDecodeError):
            raise UserError("damaged") from None
        return {key: value for key, value in content.items() if key in CONTENT or len(str(value)) != 64}

    assert refusals(path, read, CONTENT) > 150


def test_a_bit_of_a_table_of_metrics(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = MetricsCSV(str(tmp_path))
    for step in range(4):
        metrics.log_metrics({"epoch": step, "train/loss": 2.5 - step / 3, "val/accuracy": 0.1 * step}, step)
    metrics.log_metrics({"tradeoff/fp32/bytes": 1000.0, "never": None}, 4)
    metrics.save()
    with path.open(newline="") as stream:
        expected = {
            int(row["step"]): {key: row[key] for key in row if row[key] and key != "crc32"}
            for row in csv.DictReader(stream)
        }
    assert list(expected) == list(range(5))
    assert refusals(path, lambda path: MetricsCSV(str(tmp_path)).rows, expected) > 280


def test_a_bit_of_what_torch_has_saved(tmp_path):
    path = tmp_path / "last.ckpt"
    content = {"epoch": 3, "state_dict": TENSORS, "rates": [0.1, 1e-3]}
    torch.save(content, path)

    def read(path):
        try:
            check_archive(path)
            return torch.load(path, weights_only=True, mmap=True)
        except Exception as failure:
            raise UserError(str(failure).partition("\n")[0]) from None

    assert refusals(path, read, content) > 200


def test_a_bit_of_a_teacher(tmp_path):
    path = tmp_path / "teacher.safetensors"
    container.write(path, "compress-teacher-1", {"seed": 3}, TENSORS)
    assert refusals(path, lambda path: container.read(path)[1:], ({"seed": 3}, TENSORS)) > 290


def test_what_was_written_by_hand_has_no_checksum_and_is_read_as_it_is(tmp_path):
    path = tmp_path / "file"
    for text in ("a: 1\n", '{"a": 1}', "# sha256: of nothing\na: 1\n", ""):
        path.write_text(text)
        assert read_text(path) == text
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    check_archive(path)


def test_a_file_that_was_changed_on_purpose_says_how_it_is_read(tmp_path):
    path = tmp_path / "sweep.yaml"
    write_yaml(path, "a: 1\n")
    path.write_text(path.read_text().replace("1\n", "2\n"))
    with pytest.raises(UserError, match=r"sweep\.yaml: .*without the line sha256 if it was changed on purpose$"):
        read_text(path)
    path.write_text(path.read_text().partition("\n")[2])
    assert read_text(path) == "a: 2\n"
