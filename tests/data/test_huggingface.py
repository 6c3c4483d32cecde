"""Data sets of Hugging Face from local files: parquet, folders of images, what the library has saved."""

import io
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from compress.data.huggingface import HuggingFace
from compress.data.undecoded import OnDisk
from compress.errors import UserError

datasets = pytest.importorskip("datasets")
NAMES = ["cat", "dog"]


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def rows(count, label=lambda index: index % 2, image="image", target="label", kind=None):
    features = datasets.Features({image: datasets.Image(), target: kind or datasets.ClassLabel(names=NAMES)})
    pictures = [Image.fromarray(np.full((20, 30, 3), 10 * index, np.uint8)) for index in range(count)]
    content = {image: pictures, target: [label(index) for index in range(count)]}
    return datasets.Dataset.from_dict(content, features=features)


def write(root, **splits):
    (root / "data").mkdir(parents=True)
    for name, split in splits.items():
        split.to_parquet(root / "data" / f"{name}-00000-of-00001.parquet")
    return root


def module(root, **options):
    data = HuggingFace(root=root and str(root), **({"image_size": 16, "batch_size": 4} | options))
    data.prepare_data()
    data.setup()
    return data


def levels(split):
    images = split.images.select(range(len(split))) if isinstance(split.images, OnDisk) else split.images
    return (images[:, 0, 0, 0] // 10).tolist()


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_parquet_files_are_read(tmp_path, storage):
    root = write(tmp_path / "pets", train=rows(12), validation=rows(4), test=rows(6))
    data = module(root, storage=storage, workers=2)
    assert data.class_names == tuple(NAMES)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 12, "validation": 4, "test": 6}
    assert levels(data.splits["train"]) == list(range(12))
    assert data.splits["test"].labels.tolist() == [0, 1, 0, 1, 0, 1]
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, labels.shape) == ((4, 3, 16, 16), (4,))


def test_batches_on_disk_are_those_in_memory(tmp_path):
    root = write(tmp_path / "pets", train=rows(20), test=rows(6))
    held, encoded = (module(root, storage=storage, workers=2, crop_padding=2) for storage in ("memory", "disk"))
    for one, other in zip(held.train_dataloader(), encoded.train_dataloader(), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert levels(pickle.loads(pickle.dumps(encoded.splits["test"]))) == list(range(6))


def test_a_validation_split_stands_for_a_missing_test_split(tmp_path):
    data = module(write(tmp_path / "pets", train=rows(20), validation=rows(6)), validation_fraction=0.2)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 16, "validation": 4, "test": 6}


def test_columns_and_splits_can_be_named(tmp_path):
    both = rows(8).add_column("kind", [index // 4 for index in range(8)])
    both = both.cast_column("kind", datasets.ClassLabel(names=["low", "high"]))
    root = write(tmp_path / "pets", train=both, test=both)
    with pytest.raises(
        UserError, match=r"data\.label_column: found label and kind; accepted: one of image, label, kind"
    ):
        module(root)
    data = module(root, label_column="kind", train_split="test", test_split="train", validation_fraction=0.25)
    assert data.class_names == ("low", "high")
    assert data.splits["test"].labels.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize(("kind", "names"), [("string", ("bird", "emu")), ("int64", ("3", "7"))])
def test_classes_are_the_values_of_a_column_without_names(tmp_path, kind, names):
    values = [int(name) if kind == "int64" else name for name in names]
    split = rows(8, label=lambda index: values[index % 2], kind=datasets.Value(kind))
    data = module(write(tmp_path / "birds", train=split, test=split), validation_fraction=0.25)
    assert data.class_names == names
    assert data.splits["test"].labels.tolist() == [0, 1] * 4


def test_what_datasets_has_saved_and_folders_of_images_are_read(tmp_path):
    datasets.DatasetDict(train=rows(12), test=rows(6)).save_to_disk(tmp_path / "saved")
    for split, count in (("train", 6), ("test", 3)):
        for level, name in enumerate(NAMES):
            (tmp_path / "folder" / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("L", (20, 20), 10 * level).save(tmp_path / "folder" / split / name / f"{index}.png")
    for root in (tmp_path / "saved", tmp_path / "folder"):
        data = module(root, validation_fraction=0.34)
        assert data.class_names == tuple(NAMES)
        assert (len(data.splits["train"]), len(data.splits["validation"]), len(data.splits["test"])) == (8, 4, 6)


def test_a_picture_is_read_as_from_a_file(tmp_path):
    exif, shown = Image.Exif(), np.zeros((30, 20, 3), np.uint8)
    exif[0x0112], shown[:15] = 6, 255
    content = io.BytesIO()
    Image.fromarray(shown).transpose(Image.Transpose.ROTATE_90).save(content, "JPEG", exif=exif, quality=95)
    split = datasets.Dataset.from_dict(
        {"image": [{"bytes": content.getvalue(), "path": None}] * 8, "label": [0, 1] * 4},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}),
    )
    data = module(write(tmp_path / "phone", train=split, test=split), validation_fraction=0.25)
    picture = data.splits["test"].images[0].float()
    assert picture[:, :6].mean() > 240
    assert picture[:, -6:].mean() < 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": None}, "data: found neither data.name nor data.root"),
        ({"name": "somebody/pets"}, "data: found both"),
        ({"root": "nowhere"}, r"data\.root: found no folder"),
        ({"root": None, "name": "nobody/nothing"}, r"data\.name: nobody/nothing cannot be read"),
        ({"image_column": "photo"}, r"data\.image_column: found 'photo', which is no column; accepted: image, label"),
        ({"label_column": "kind"}, r"data\.label_column: found 'kind'"),
        ({"test_split": "dev"}, r"data\.test_split: found 'dev', which .* lacks; accepted: train, test"),
        ({"test_split": "train"}, "has the splits train, test, of which no two"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, options, message):
    root = write(tmp_path / "pets", train=rows(8), test=rows(4))
    with pytest.raises(UserError, match=message) as caught:
        module(**({"root": root} | options))
    assert "\n" not in str(caught.value)


def test_labels_that_are_hidden_and_rows_without_an_image_are_named(tmp_path):
    hidden = rows(4, label=lambda _: -1)
    with pytest.raises(UserError, match=r"has in the split test the label -1"):
        module(write(tmp_path / "hidden", train=rows(8), test=hidden))
    content = {"image": [{"bytes": b"no image", "path": "a.png"}] * 8, "label": [0, 1] * 4}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    damaged = datasets.Dataset.from_dict(content, features=features)
    with pytest.raises(UserError, match=r"damaged test, row 0: cannot be read \(no image"):
        module(write(tmp_path / "damaged", train=rows(8), validation=rows(4), test=damaged))


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'compress\[huggingface\]'"):
        HuggingFace(root=str(tmp_path), image_size=8).prepare_data()
