"""One Lightning fit, for teachers and students alike: checkpoints, early stopping, resuming."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import Logger

from compress.progress import EpochLines

BEST, LAST = "best.ckpt", "last.ckpt"


def fit(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    trainer_options: dict[str, Any],
    directory: Path,
    *,
    label: str,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[pl.Callback] = (),
) -> pl.Trainer:
    """Trains `module`, from `directory/last.ckpt` on if there is one, and returns the Trainer.

    `directory` receives `best.ckpt` (highest validation accuracy, the earliest of equals) and `last.ckpt`, written
    at the end of every epoch. `trainer_options` are Lightning's, and `early_stopping` and `log_every`.
    """
    options = {key: value for key, value in trainer_options.items() if key != "_target_"}
    patience, log_every = options.pop("early_stopping"), options.pop("log_every")
    own = [
        EpochLines(label, log_every),
        # After the epoch, when the training metrics are known too; the best comes before the last, so that a run
        # killed between the two repeats an epoch rather than losing its best.
        ModelCheckpoint(
            directory,
            filename=BEST.removesuffix(".ckpt"),
            monitor="val/accuracy",
            mode="max",
            save_last=True,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        ),
    ]
    if patience is not None:
        own.append(EarlyStopping("val/accuracy", mode="max", patience=patience))
    _quieten()
    trainer = pl.Trainer(
        **options,
        logger=list(loggers) or False,
        callbacks=[*own, *callbacks],
        default_root_dir=directory,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    last = directory / LAST
    trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)
    return trainer


def _quieten() -> None:
    """Lightning's advice and device banners, which a table of results does not need."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*Checkpoint directory .* exists.*", ".*treespec.*"):
        warnings.filterwarnings("ignore", message)
