"""Pictures without labels, and names of classes from a file."""

import json

import pytest
import torch
from PIL import Image

from compress.data.digits import Digits
from compress.data.folder import Folder
from compress.data.unlabelled import Unlabelled, has_labels
from compress.errors import UserError
from compress.models import build
from compress.pipeline.check import checked_jobs
from compress.pipeline.variants import Variants

NAMES = ["zebra", "ant", "cow"]


def write_pictures(root, count=20):
    for index in range(count):
        path = root / ("deep" if index % 2 else ".") / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), (10 * index, 0, 0)).save(path)


def unlabelled(root, **options):
    data = Unlabelled(**({"root": str(root), "image_size": 8, "class_names": NAMES} | options))
    data.prepare_data()
    data.setup()
    return data


def levels(split):
    return sorted((split.images[:, 0, 0, 0] // 10).tolist())


def test_every_picture_is_for_calibration_or_for_comparison(tmp_path):
    write_pictures(tmp_path)
    data = unlabelled(tmp_path, validation_fraction=0.25)
    assert (data.class_names, data.num_classes) == (tuple(NAMES), 3)
    assert not has_labels(tmp_path)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 15, "validation": 5, "test": 5}
    assert levels(data.splits["test"]) == levels(data.splits["validation"])
    assert sorted(levels(data.splits["train"]) + levels(data.splits["test"])) == list(range(20))
    assert len(torch.cat(data.calibration_batches(256))) == 15
    assert sum(len(unlabelled(tmp_path, limit=8).splits[name]) for name in ("train", "test")) == 8


def test_a_single_picture_is_for_both(tmp_path):
    write_pictures(tmp_path, count=1)
    data = unlabelled(tmp_path)
    assert levels(data.splits["train"]) == levels(data.splits["test"]) == [0]


def test_a_network_can_give_the_labels(tmp_path):
    write_pictures(tmp_path)
    data = unlabelled(tmp_path, validation_fraction=0.5)
    data.label(lambda images: torch.stack([-images[:, 0, 0, 0], images[:, 0, 0, 0]], dim=1))
    _, labels = next(iter(data.test_dataloader()))
    red = data.splits["test"].images[:, 0, 0, 0].float() / 255
    assert labels.tolist() == (red > data.mean[0]).long().tolist()
    assert 0 < labels.sum() < len(labels)


def test_images_of_another_class_without_labels_are_labelled_too(tmp_path):
    class OfTheUser(Digits):
        labelled = False

        def label(self, network):
            self.labelled_by = network

    data = OfTheUser(image_size=8, limit=100)
    data.setup()
    student = build("resnet8", 10)
    variants = Variants(data, tmp_path, {"stem": "resnet8", "options": {}, "num_classes": 10}, exporters=[])
    variants.add_float(student)
    assert data.labelled_by is student
    assert [(row.validation_accuracy, row.test_accuracy) for row in variants.rows] == [(None, None)]


def test_nothing_is_trained_on_them(tmp_path):
    write_pictures(tmp_path)
    data = ["data=folder", "data._target_=compress.data.unlabelled.Unlabelled", f"data.root={tmp_path}"]
    with pytest.raises(UserError, match=r"^data\._target_: found Unlabelled, without labels; accepted: data"):
        checked_jobs([*data, f"data.class_names=[{','.join(NAMES)}]", "method=supervised", "student=resnet8"])


@pytest.mark.parametrize("content", ["zebra\nant\ncow\n", json.dumps(NAMES), "\ufeffzebra\r\nant\r\ncow"])
def test_names_come_from_lines_or_a_json_list(tmp_path, content):
    (tmp_path / "names").write_bytes(content.encode())
    write_pictures(tmp_path / "pictures", 2)
    assert unlabelled(tmp_path / "pictures", class_names=str(tmp_path / "names")).class_names == tuple(NAMES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\n\nb", "something that is no name"),
        ('{"0": "a"}', "something that is no name"),
        ("[1, 2]", "something that is no name"),
        ("a", "1 names"),
        ("a\nb\na", "'a' twice"),
        ("[", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_holds_no_names_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "names").write_text(content)
    with pytest.raises(UserError, match=rf"^data.class_names: .*{message}.*; accepted: ") as caught:
        Folder(root=str(tmp_path), image_size=8, class_names=str(tmp_path / "names"))
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(tmp_path):
    write_pictures(tmp_path / "pictures", 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"data\.class_names: found none"):
        unlabelled(tmp_path / "pictures", class_names=None)
    with pytest.raises(UserError, match=r"data\.root: .*empty holds no image"):
        unlabelled(tmp_path / "empty")
    with pytest.raises(UserError, match=r"data\.root: found no folder"):
        unlabelled(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"data\.root: found no folder .*train; accepted"):
        Folder(root=str(tmp_path / "pictures"), image_size=8).prepare_data()


def test_given_names_set_the_order_of_the_labels(tmp_path):
    for split in ("train", "test"):
        for level, name in enumerate(sorted(NAMES)):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(4):
                Image.new("L", (9, 9), 10 * level).save(tmp_path / split / name / f"{index}.png")
    data = Folder(root=str(tmp_path), image_size=8, class_names=NAMES, validation_fraction=0.25)
    data.prepare_data()
    data.setup()
    test = data.splits["test"]
    assert data.class_names == tuple(NAMES)
    assert [sorted(NAMES)[level // 10] for level in test.images[:, 0, 0, 0]] == [NAMES[label] for label in test.labels]
    with pytest.raises(UserError, match=r"data\.class_names: the names and the folders .* differ in cow, dog"):
        Folder(root=str(tmp_path), image_size=8, class_names=["zebra", "ant", "dog"]).prepare_data()
