"""Every data set from files in its real format, and what it says of files that are not."""

import gzip
import hashlib
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compress.data import cifar, digits, fashion_mnist, folder
from compress.data.fashion_mnist import FILES
from compress.errors import UserError

FASHION = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))


def write_idx(path, values):
    content = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(root, unpacked=False):
    root.mkdir(parents=True)
    random = np.random.default_rng(0)
    written = {}
    for name in FILES:
        count = 200 if name.startswith("train") else 50
        shape = (count, 28, 28) if "images" in name else (count,)
        values = random.integers(0, 256, shape, np.uint8) if "images" in name else np.arange(count, dtype=np.uint8) % 10
        written[name] = values
        write_idx(root / (name.removesuffix(".gz") if unpacked else name), values)
    return written


def write_cifar(root, hundred=False):
    """Batches as the archive has them: protocol 2, keys as text, rows of 3,072 bytes. Not those of its MD5 sums."""
    base = root / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    base.mkdir(parents=True)
    random = np.random.default_rng(0)
    classes = 100 if hundred else 10
    names = ["train", "test"] if hundred else [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    rows = {}
    for name in names:
        data = random.integers(0, 256, (4 * classes, 3072), np.uint8)
        labels = list(range(classes)) * 4
        key = "fine_labels" if hundred else "labels"
        (base / name).write_bytes(pickle.dumps({"data": data, key: labels, "filenames": ["a.png"]}, protocol=2))
        rows[name] = data
    key, meta = ("fine_label_names", "meta") if hundred else ("label_names", "batches.meta")
    (base / meta).write_bytes(pickle.dumps({key: [f"class {index}" for index in range(classes)]}, protocol=2))
    return base, rows


def accept(monkeypatch, kind, *paths):
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in paths}
    monkeypatch.setattr(kind, "sums", kind.sums | sums)


def write_folder(root, splits=("train", "val", "test"), classes=("cat", "dog")):
    for split in splits:
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(6):
                image = Image.new("RGB", (40 + 10 * index, 30), (200 * number, 40 * index, 0))
                image.save(root / split / name / f"{index}.png")


def test_digits_are_split_with_the_classes_in_their_shares():
    data = digits.Digits(image_size=8, validation_fraction=0.15)
    data.setup()
    assert {name: len(each) for name, each in data.splits.items()} == {"train": 1221, "validation": 216, "test": 360}
    whole = torch.cat([each.labels for each in data.splits.values()]).bincount() / 1797
    for each in data.splits.values():
        assert (each.labels.bincount() / len(each) - whole).abs().max() < 0.01


def test_the_split_follows_the_split_seed_and_nothing_else():
    def validation(**options):
        data = digits.Digits(image_size=8, **options)
        data.setup()
        return data.splits["validation"].images

    assert torch.equal(validation(seed=0), validation(seed=1))
    assert not torch.equal(validation(), validation(split_seed=1))


def test_digits_can_be_enlarged():
    data = digits.Digits(image_size=16)
    data.setup()
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (64, 3, 16, 16)


@pytest.mark.parametrize("layout", ["plain", "torchvision", "unpacked"])
def test_fashion_mnist_is_read_in_every_layout(tmp_path, layout):
    files = tmp_path / "FashionMNIST" / "raw" if layout == "torchvision" else tmp_path / "files"
    written = write_fashion(files, unpacked=layout == "unpacked")
    data = fashion_mnist.FashionMNIST(root=str(tmp_path if layout == "torchvision" else files), image_size=28)
    data.prepare_data()
    data.setup()
    images, labels = written["t10k-images-idx3-ubyte.gz"], written["t10k-labels-idx1-ubyte.gz"]
    assert np.array_equal(data.splits["test"].images[:, 0].numpy(), images)
    assert np.array_equal(data.splits["test"].labels.numpy(), labels)


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "wrong header", "fewer labels"])
def test_damaged_fashion_mnist_is_named(tmp_path, damage):
    written = write_fashion(tmp_path / "files")
    name = "train-labels-idx1-ubyte.gz" if damage == "fewer labels" else "train-images-idx3-ubyte.gz"
    path = tmp_path / "files" / name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "not gzip":
        path.write_bytes(b"hello")
    elif damage == "wrong header":
        path.write_bytes(gzip.compress(struct.pack(">HBBI", 0, 13, 1, 3) + b"abc"))
    else:
        write_idx(path, written[name][:-1])
    data = fashion_mnist.FashionMNIST(root=str(tmp_path / "files"), image_size=28)
    with pytest.raises(UserError, match=r"train-images|files"):
        data.setup()


@pytest.mark.slow
@pytest.mark.fashion_mnist
@pytest.mark.skipif(not FASHION.exists(), reason=f"no Fashion-MNIST in {FASHION}")
def test_the_real_fashion_mnist():
    data = fashion_mnist.FashionMNIST(root=str(FASHION), image_size=28)
    data.prepare_data()
    data.setup()
    assert data.splits["test"].labels.bincount().tolist() == [1000] * 10
    assert data.splits["train"].labels.bincount().tolist() == [5400] * 10
    values = torch.cat([data.splits["train"].images, data.splits["validation"].images]).double() / 255
    assert values.mean().item() == pytest.approx(0.2860, abs=1e-4)
    assert values.std().item() == pytest.approx(0.3530, abs=1e-4)


@pytest.mark.parametrize("hundred", [False, True])
def test_cifar_is_read_from_its_folder_and_from_its_archive(tmp_path, monkeypatch, hundred):
    base, rows = write_cifar(tmp_path / "made", hundred)
    kind = cifar.CIFAR100 if hundred else cifar.CIFAR10
    archive = tmp_path / "packed" / kind.published.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(base, base.name)
    accept(monkeypatch, kind, archive, *base.iterdir())
    for root in (tmp_path / "made", tmp_path / "packed"):
        data = kind(root=str(root), image_size=32, validation_fraction=0.25)
        data.prepare_data()
        data.setup()
        expected = rows["test" if hundred else "test_batch"].reshape(-1, 3, 32, 32)
        assert np.array_equal(data.splits["test"].images.numpy(), expected)
        assert data.num_classes == (100 if hundred else 10)
        assert data.class_names[3] == "class 3"
        total = sum(len(values) for name, values in rows.items() if "test" not in name)
        assert len(data.splits["train"]) + len(data.splits["validation"]) == total
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
            images, labels = next(iter(loader))
            assert images.shape == (len(labels), 3, 32, 32)
        assert len(data.calibration_batches(8)[0]) == 8


def test_a_pickle_that_names_code_is_refused_and_not_run(tmp_path, monkeypatch):
    base, _ = write_cifar(tmp_path)
    accept(monkeypatch, cifar.CIFAR10, *base.iterdir())
    witness = tmp_path / "witness"

    class Payload:
        def __reduce__(self):
            return (Path.touch, (witness,))

    (base / "data_batch_3").write_bytes(pickle.dumps({"data": Payload()}))
    data = cifar.CIFAR10(root=str(tmp_path), image_size=32)
    with pytest.raises(UserError, match="data_batch_3"):
        data.setup()
    assert not witness.exists()


def test_the_sums_are_those_that_torchvision_publishes():
    assert cifar.CIFAR10.sums["cifar-10-python.tar.gz"] == "c58f30108f718f92721af3b95e74349a"
    assert cifar.CIFAR100.sums["cifar-100-python.tar.gz"] == "eb9058c3a382ffc7106e4002c42a8d85"
    assert len(cifar.CIFAR10.sums) == 8
    assert set(cifar.CIFAR100.sums) == {"cifar-100-python.tar.gz", "train", "test", "meta"}


def test_missing_cifar_files_and_a_broken_archive_are_named(tmp_path):
    base, _ = write_cifar(tmp_path / "a")
    (base / "data_batch_2").unlink()
    with pytest.raises(UserError, match="data_batch_2"):
        cifar.CIFAR10(root=str(tmp_path / "a"), image_size=32).prepare_data()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "cifar-10-python.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz: found the MD5 sum \w+; accepted: c58f30108f718f92"):
        cifar.CIFAR10(root=str(tmp_path / "b"), image_size=32).prepare_data()


def test_a_folder_of_images_of_any_size(tmp_path):
    write_folder(tmp_path)
    data = folder.Folder(root=str(tmp_path), image_size=16)
    data.prepare_data()
    data.setup()
    assert data.class_names == ("cat", "dog")
    assert {name: len(each) for name, each in data.splits.items()} == {"train": 12, "validation": 12, "test": 12}
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape[1:] == (3, 16, 16)
        assert set(labels.tolist()) == {0, 1}
    assert data.splits["test"].images[7].float().mean((1, 2)).tolist() == pytest.approx([200, 40, 0])


def test_a_folder_without_validation_images_is_split(tmp_path):
    write_folder(tmp_path, splits=("train", "test"))
    data = folder.Folder(root=str(tmp_path), image_size=16, validation_fraction=0.3)
    data.prepare_data()
    data.setup()
    assert {name: len(each) for name, each in data.splits.items()} == {"train": 8, "validation": 4, "test": 12}


def test_what_is_wrong_with_a_folder_is_named(tmp_path):
    def read(root):
        data = folder.Folder(root=str(root), image_size=16)
        data.prepare_data()
        data.setup()

    def message(root):
        with pytest.raises(UserError) as caught:
            read(root)
        return str(caught.value)

    write_folder(tmp_path / "a", splits=("train",))
    assert "test" in message(tmp_path / "a")
    write_folder(tmp_path / "b")
    (tmp_path / "b" / "test" / "emu").mkdir()
    assert "emu" in message(tmp_path / "b")
    write_folder(tmp_path / "c")
    (tmp_path / "c" / "val" / "dog" / "3.png").write_bytes(b"no image")
    assert "3.png" in message(tmp_path / "c")
    write_folder(tmp_path / "d")
    for path in (tmp_path / "d" / "train" / "cat").iterdir():
        path.unlink()
    assert "cat" in message(tmp_path / "d")
    assert "nowhere" in message(tmp_path / "nowhere")
    write_folder(tmp_path / "e", classes=("cat",))
    assert "at least 2" in message(tmp_path / "e")
