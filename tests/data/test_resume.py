"""A run that Lightning resumes sees the batches that the undisturbed one would have seen."""

import pytest
import pytorch_lightning as pl
import torch

from compress.data.digits import Digits


class Witness(pl.LightningModule):
    """Notes what each training step receives."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, _):
        images, labels = batch
        self.seen.append((self.current_epoch, images.double().sum().item(), labels.tolist()))
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def seen(directory, epochs, checkpoint=None):
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[pl.callbacks.ModelCheckpoint(directory, save_last=True)],
    )
    witness = Witness()
    data = Digits(image_size=8, batch_size=400, crop_padding=1, horizontal_flip=True, cutout=3, seed=4)
    trainer.fit(witness, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return witness.seen


@pytest.mark.slow
def test_a_resumed_run_sees_the_batches_of_an_undisturbed_one(tmp_path):
    undisturbed = seen(tmp_path / "whole", epochs=4)
    first = seen(tmp_path / "parts", epochs=2)
    second = seen(tmp_path / "parts", epochs=4, checkpoint=tmp_path / "parts" / "last.ckpt")
    assert [epoch for epoch, *_ in undisturbed] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert first + second == undisturbed
    assert len({total for _, total, _ in undisturbed}) == len(undisturbed)
