"""Images that stay on disk: the batches, and the trained network, of images in memory."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn

from compress.data import file_module, memory
from compress.data.folder import Folder
from compress.data.undecoded import ImageFiles, OnDisk
from compress.errors import UserError

AUGMENTED = {"crop_padding": 2, "horizontal_flip": True, "cutout": 4, "randaugment": 1}
PHOTOS = {"random_resized_crop": [0.1, 1.0], "colour_jitter": [0.4, 0.4, 0.4, 0.1], "stored_size": 20}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Photos of many sizes as JPEGs, 40 for training."""
    root, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 7)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 256, (20 + 3 * index, 70 - 2 * index, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index:02}.jpg")
    return root


def module(root, storage, **options):
    data = Folder(root=str(root), image_size=16, batch_size=8, storage=storage, **(AUGMENTED | options))
    data.prepare_data()
    data.setup()
    return data


def epochs(data, count=2):
    loader, batches = data.train_dataloader(), []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        batches += loader
    return [*batches, *data.val_dataloader(), *data.test_dataloader()]


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 2}, {"workers": 2} | PHOTOS])
def test_the_batches_are_those_of_images_in_memory(root, options):
    held, encoded = module(root, "memory", **options), module(root, "disk", **options)
    assert isinstance(held.splits["train"].images, torch.Tensor)
    assert isinstance(encoded.splits["train"].images, OnDisk)
    for one, other in zip(epochs(held), epochs(encoded), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
        assert one[0].stride() == other[0].stride()
    for one, other in zip(held.calibration_batches(20, 7), encoded.calibration_batches(20, 7), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("storage", "workers"), [("memory", 0), ("disk", 0), ("disk", 1)])
def test_a_picture_of_too_many_pixels_is_refused_wherever_it_is_decoded(root, storage, workers):
    with pytest.raises(UserError, match=r"pixels; accepted: up to 1,500, or"):
        epochs(module(root, storage, workers=workers, max_pixels=1500), 1)


class Learner(pl.LightningModule):
    """With dropout, which would show whether a loader draws from the global generator."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(768, 2))

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.network(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_trained_network_is_that_of_images_in_memory(root, tmp_path, workers):
    trained = []
    for storage in ("memory", "disk"):
        pl.seed_everything(0, verbose=False)
        learner = Learner()
        trainer = pl.Trainer(
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(learner, datamodule=module(root, storage, workers=workers))
        trained.append(learner.network[2].weight.detach().clone())
    assert torch.equal(*trained)


def test_images_stay_on_disk_where_they_would_take_more_than_a_share_of_the_memory(root, monkeypatch, capsys):
    needed = 54 * 3 * 16**2
    monkeypatch.setattr(file_module, "free_bytes", lambda _: int(needed / memory.MEMORY_SHARE))
    assert isinstance(module(root, "auto").splits["test"].images, torch.Tensor)
    monkeypatch.setattr(file_module, "free_bytes", lambda _: int(needed / memory.MEMORY_SHARE) - 1)
    assert isinstance(module(root, "auto").splits["test"].images, OnDisk)
    assert "so they stay on disk" in capsys.readouterr().out


def test_the_free_memory_is_that_within_the_limit_of_a_container(tmp_path, monkeypatch):
    assert 1 << 20 < memory.free_bytes(torch.device("cpu")) < 1 << 50
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:    800 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free_bytes(torch.device("cpu")) == 800 * 1024
    for name, content in (("memory.max", "max\n"), ("memory.current", "5000\n"), ("memory.stat", "inactive_file 2000")):
        (tmp_path / name).write_text(content)
    assert memory.free_bytes(torch.device("cpu")) == 800 * 1024
    (tmp_path / "memory.max").write_text("10000\n")
    assert memory.free_bytes(torch.device("cpu")) == 7000


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_on_disk_is_named_in_one_line_when_it_is_met(root, tmp_path, workers):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split).mkdir(exist_ok=True)
            (tmp_path / split / name).symlink_to(root / split / name)
    (tmp_path / "test" / "cow").mkdir()
    (tmp_path / "train" / "cow").mkdir()
    for split in ("train", "test"):
        for index in range(9):
            Image.new("RGB", (20, 20)).save(tmp_path / split / "cow" / f"{index}.png")
    (tmp_path / "test" / "cow" / "4.png").write_bytes(b"no image")
    data = module(tmp_path, "disk", workers=workers)
    with pytest.raises(UserError, match=r"4\.png: cannot be read") as caught:
        list(data.test_dataloader())
    assert "\n" not in str(caught.value)


def test_paths_with_any_bytes_come_back(tmp_path):
    paths = [tmp_path / name for name in ("a.png", "ä ö.png", "\udcff.png")]
    for level, path in enumerate(paths):
        Image.new("L", (4, 4), 10 * level).save(path)
    images = ImageFiles(paths)
    assert images.decoded([2, 0, 1], 4)[:, 0, 0, 0].tolist() == [20, 0, 10]
    assert images[torch.tensor([1])].read(0, 4)[0, 0, 0] == 10
    assert torch.equal(images.decoded(range(3), 4, threads=2), images.decoded(range(3), 4))
