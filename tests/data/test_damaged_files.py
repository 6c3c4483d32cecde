"""Damaged and foreign files: one line that names them, and no half-made data set behind."""

import gzip
import pickle
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from compress.data.cifar import CIFAR10
from compress.data.fashion_mnist import FILES, FashionMNIST
from compress.data.folder import Folder
from compress.errors import UserError

ROWS = np.random.default_rng(0).integers(0, 256, (40, 3072), np.uint8)
GOOD = {"data": ROWS, "labels": [index % 10 for index in range(40)]}
NAMES = {"label_names": [f"class {index}" for index in range(10)]}


def write_cifar(root, **replaced):
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    batches = [f"data_batch_{number}" for number in range(1, 6)]
    for name in (*batches, "test_batch", "batches.meta"):
        content = replaced.get(name.replace(".", "_"), NAMES if name == "batches.meta" else GOOD)
        (base / name).write_bytes(pickle.dumps(content, protocol=2))
    return base


@pytest.mark.parametrize(
    "content",
    [
        GOOD | {"labels": [10] * 40},
        GOOD | {"labels": [-1] * 40},
        GOOD | {"labels": ["cat"] * 40},
        GOOD | {"labels": [1] * 39},
        GOOD | {"labels": 5},
        GOOD | {"data": ROWS[:, :-1]},
        GOOD | {"data": ROWS.astype(np.float32)},
        {"labels": GOOD["labels"]},
        [1, 2, 3],
    ],
)
def test_a_cifar_batch_with_other_content_is_named(tmp_path, content):
    write_cifar(tmp_path, data_batch_2=content)
    with pytest.raises(UserError, match="data_batch_2"):
        CIFAR10(root=str(tmp_path), image_size=32).setup()


def test_cifar_labels_beyond_the_names_of_the_classes_are_refused(tmp_path):
    write_cifar(tmp_path, batches_meta={"label_names": ["cat", "dog"]})
    with pytest.raises(UserError, match="2 classes"):
        CIFAR10(root=str(tmp_path), image_size=32).setup()


def test_whatever_bytes_of_a_cifar_batch_are_damaged_it_is_read_or_named(tmp_path):
    path = write_cifar(tmp_path) / "data_batch_1"
    whole, random, messages = path.read_bytes(), np.random.default_rng(1), []
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[random.integers(0, 400)] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            CIFAR10(root=str(tmp_path), image_size=32).read()
        except UserError as error:
            messages.append(str(error))
    assert 0 < len(messages) < 500
    assert all("data_batch_1" in message and "\n" not in message for message in messages)


def test_an_archive_that_breaks_off_leaves_no_half_data_set(tmp_path):
    archive = tmp_path / "root" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(write_cifar(tmp_path / "made"), "cifar-10-batches-py")
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be unpacked"):
        CIFAR10(root=str(archive.parent), image_size=32).prepare_data()
    assert list(archive.parent.iterdir()) == [archive]
    archive.write_bytes(whole)
    CIFAR10(root=str(archive.parent), image_size=32).prepare_data()
    assert sorted(path.name for path in archive.parent.iterdir()) == ["cifar-10-batches-py", archive.name]


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
