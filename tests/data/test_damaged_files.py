"""Damaged and foreign files: one line that names them, and no half-made data set behind."""

import gzip
import hashlib
import pickle
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from compress.data.cifar import CIFAR10
from compress.data.fashion_mnist import FILES, FashionMNIST, read_idx
from compress.data.folder import Folder
from compress.errors import UserError


def write_cifar(root, monkeypatch):
    """Files with the names of CIFAR-10's, whose sums are the ones that are accepted."""
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    rows = np.random.default_rng(0).integers(0, 256, (40, 3072), np.uint8)
    batch = {"data": rows, "labels": [index % 10 for index in range(40)]}
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (base / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = {"label_names": [f"class {index}" for index in range(10)]}
    (base / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    accept(monkeypatch, *base.iterdir())
    return base


def accept(monkeypatch, *paths):
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in paths}
    monkeypatch.setattr(CIFAR10, "sums", CIFAR10.sums | sums)


def test_a_cifar_file_with_one_changed_byte_is_named(tmp_path, monkeypatch):
    base = write_cifar(tmp_path, monkeypatch)
    random = np.random.default_rng(1)
    for path in sorted(base.iterdir()):
        content = path.read_bytes()
        for place in random.integers(0, len(content), 5):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(UserError, match=f"^.*{path.name}: found the MD5 sum [^\n]*$"):
                CIFAR10(root=str(tmp_path), image_size=32).read()
        path.write_bytes(content)
    CIFAR10(root=str(tmp_path), image_size=32).read()


def test_an_archive_that_breaks_off_leaves_no_half_data_set(tmp_path, monkeypatch):
    archive = tmp_path / "root" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(write_cifar(tmp_path / "made", monkeypatch), "cifar-10-batches-py")
    complete = archive.read_bytes()
    accept(monkeypatch, archive)
    archive.write_bytes(complete[: len(complete) // 2])
    with pytest.raises(UserError, match="found the MD5 sum"):
        CIFAR10(root=str(archive.parent), image_size=32).prepare_data()
    assert list(archive.parent.iterdir()) == [archive]
    archive.write_bytes(complete)
    CIFAR10(root=str(archive.parent), image_size=32).prepare_data()
    assert sorted(path.name for path in archive.parent.iterdir()) == ["cifar-10-batches-py", archive.name]


def test_an_archive_with_three_changed_bytes_is_never_unpacked(tmp_path, monkeypatch):
    archive = tmp_path / "root" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(write_cifar(tmp_path / "made", monkeypatch), "cifar-10-batches-py")
    accept(monkeypatch, archive)
    complete = archive.read_bytes()
    random = np.random.default_rng(2)
    for _ in range(20):
        damaged = bytearray(complete)
        for place in random.choice(len(complete), 3, replace=False):
            damaged[place] ^= 1 << random.integers(8)
        archive.write_bytes(damaged)
        with pytest.raises(UserError, match="found the MD5 sum"):
            CIFAR10(root=str(archive.parent), image_size=32).prepare_data()
        assert list(archive.parent.iterdir()) == [archive]


def test_a_changed_bit_of_fashion_mnist_is_found_by_the_checksum_of_gzip(tmp_path):
    path = tmp_path / "images.gz"
    values = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    content = gzip.compress(struct.pack(">HBB3I", 0, 8, 3, *values.shape) + values.tobytes(), mtime=0)
    random = np.random.default_rng(3)
    for place in random.integers(0, len(content), 100):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << random.integers(8)]) + content[place + 1 :])
        try:
            found = read_idx(path)
        except UserError as refused:
            assert str(refused).startswith(f"{path}: ")  # noqa: PT017
        else:  # the header of gzip names a time and a system, too
            assert np.array_equal(found.numpy(), values)
    path.write_bytes(content[:-8] + bytes(4) + content[-4:])
    with pytest.raises(UserError, match="CRC"):
        read_idx(path)


@pytest.mark.parametrize("shape", [(0, 28, 28), (20, 14, 56)])
def test_fashion_mnist_of_another_shape_is_refused(tmp_path, shape):
    for name in FILES:
        values = np.zeros(shape if "images" in name else shape[:1], np.uint8)
        header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
        (tmp_path / name).write_bytes(gzip.compress(header + values.tobytes()))
    with pytest.raises(UserError, match="28x28"):
        FashionMNIST(root=str(tmp_path), image_size=28).setup()


def test_what_file_managers_leave_beside_the_images_is_no_image(tmp_path):
    for folder in ("train/cat", "train/dog", "val/cat", "val/dog", "test/cat", "test/dog"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / folder / "one.png")
    (tmp_path / "train/cat/._one.png").write_bytes(b"not an image")
    (tmp_path / "train/cat/more.png").mkdir()
    data = Folder(root=str(tmp_path), image_size=16)
    data.prepare_data()
    data.setup()
    assert len(data.splits["train"]) == 2
