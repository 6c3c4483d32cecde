"""One Lightning fit, for teachers and students alike: checkpoints, early stopping, resuming."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import Logger

from compress.arguments import arguments_of
from compress.checksums import check_archive
from compress.errors import UserError, in_one_line
from compress.files import write_atomically
from compress.methods.classifier import Classifier
from compress.methods.step_graph import StepGraph, hindrance
from compress.progress import console
from compress.training import processes
from compress.training.averaging import MovingAverage
from compress.training.compiling import compile_networks
from compress.training.epoch_lines import EpochLines, is_validated
from compress.training.torch_flags import TorchFlags

BEST, LAST = "best.ckpt", "last.ckpt"


def fit(
    module: Classifier,
    data: pl.LightningDataModule,
    trainer_options: dict[str, Any],
    directory: Path,
    *,
    label: str,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[pl.Callback] = (),
    first_best: int = 0,
) -> pl.Trainer:
    """Trains `module`, from `directory/last.ckpt` on if there is one, and returns the Trainer.

    `directory` receives `best.ckpt` (highest validation accuracy, the earliest of equals) and `last.ckpt`, written
    at the end of every epoch. Training that diverges ends, with the best epoch before that. `trainer_options` are
    Lightning's, and `early_stopping`, `log_every`, `ema_decay`, `compile` and `cuda_graph`. Epochs before `first_best`,
    counted from 0, are not yet what is wanted: none of them can be the best, and none counts for early stopping.

    Raises UserError where training diverges in the first epoch.
    """
    options = arguments_of(trainer_options)
    called = _callbacks(options, directory, label, callbacks, first_best)
    if options.pop("cuda_graph", True) and device(options["accelerator"]).type == "cuda":
        replay(module, options)
    if options.pop("compile", False):
        compile_networks(module.learning_networks)
    if device(options["accelerator"]).type == "cuda" and options.get("deterministic") is None:
        # A resumed run is to end as the undisturbed one would have.
        options["deterministic"] = None if options.get("benchmark") else "warn"
    options |= processes.lightning_options(options, module.learning_networks, module.input_shape)
    plugins = options.pop("plugins")
    _quieten()
    last = directory / LAST
    restoring = Restoring(last.exists())
    trainer = pl.Trainer(
        **options,
        logger=list(loggers) or False,
        callbacks=[restoring, *called],
        default_root_dir=directory,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        plugins=[AtomicCheckpoints(), *plugins],
    )
    if options["precision"] == "64-true":
        # Lightning does so too, but only after it has loaded a checkpoint's weights into float32.
        module.double()
    if (directory / BEST).exists():
        epoch_of(directory / BEST)  # which is not read before the training is over
    if last.exists():
        console.print(f"  continuing after epoch {epoch_of(last)}")
    try:
        trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)
    except Exception as failure:  # what a checkpoint holds can fit this training in no end of ways
        if restoring.is_going_on and in_one_line(failure) is None:
            raise damaged(last) from failure
        raise
    finally:
        module.step_graph = None  # after a failure; the end of the training does so before its callbacks
    return trainer


def _callbacks(
    options: dict[str, Any], directory: Path, label: str, callbacks: Sequence[pl.Callback], first_best: int
) -> list[pl.Callback]:
    """The callbacks of a fit, see `fit`, which takes those of the `options` out that are not Lightning's."""
    patience, log_every = options.pop("early_stopping"), options.pop("log_every")
    decay = options.pop("ema_decay", None)
    called = [
        TorchFlags(),
        EpochLines(label, log_every),
        Divergence(label, directory / BEST),
        # The best comes before the last: a run killed between the two repeats an epoch rather than losing its best.
        Checkpoint(directory / BEST, first_best, monitor="val/accuracy", mode="max"),
        Checkpoint(directory / LAST),
        *callbacks,
    ]
    if patience is not None:
        # Before the checkpoints, which are to hold how long it has waited.
        called.insert(0, Patience("val/accuracy", first_best, mode="max", patience=patience))
    if decay is not None:
        # After whatever else changes the weights after a batch.
        called.append(MovingAverage(decay))
    return called


def epoch_of(path: Path) -> int:
    """The number, from 1, of the epoch at whose end the checkpoint at `path` was written; raises as reading does."""
    return 1 + int(read_checkpoint(path)["epoch"])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of `best.ckpt` or `last.ckpt`. Raises UserError where the file has been damaged since."""
    try:
        check_archive(path)
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        int(content["epoch"])
        return content
    except Exception as failure:  # a damaged file can fail anywhere in the decoder, with any exception
        if in_one_line(failure) is not None:
            raise
        raise damaged(path) from failure


def damaged(path: Path) -> UserError:
    """What to say of a checkpoint that cannot be gone on from."""
    return UserError(
        f"resume: found {path}, which is damaged; accepted: to remove {path.parent}, and training begins anew"
    )


class Checkpoint(ModelCheckpoint):
    """Writes `path` at the end of an epoch, from epoch `first` on, when the training metrics are known too.

    One that monitors a metric looks at the epochs alone that are validated.
    """

    def __init__(self, path: Path, first: int = 0, **options: Any) -> None:
        self.first = first
        options |= {"save_on_train_epoch_end": True, "enable_version_counter": False}
        super().__init__(path.parent, path.stem, **options)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch >= self.first and (self.monitor is None or is_validated(trainer)):
            super().on_train_epoch_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning forgets the best score when the directory was moved; the files have moved with it."""

        assert self.dirpath is not None  # the constructor gives one
        directory = Path(self.dirpath)

        def here(path: str) -> str:
            return str(directory / Path(path).name)

        moved: dict[str, Any] = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path")}
        moved["best_k_models"] = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | moved | {"dirpath": self.dirpath})


class Restoring(pl.Callback):
    """Knows whether a training is still taking over what its checkpoint holds."""

    def __init__(self, has_checkpoint: bool) -> None:
        self.is_going_on = has_checkpoint

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.is_going_on = False


class Divergence(pl.Callback):
    """Ends a training whose weights are no numbers any more, which they would stay; `best` may be from before that."""

    def __init__(self, label: str, best: Path) -> None:
        self.label = label
        self.best = best

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _is_finite(pl_module):
            return
        message = f"{self.label}: training diverged in epoch {trainer.current_epoch + 1}, its weights are not finite"
        if not self.best.exists():
            key = "teacher.training.optimizer.lr" if self.label == "teacher" else "optimizer.lr"
            raise UserError(f"{message}; accepted: a smaller {key}")
        console.print(f"  {message}; going on with the best epoch before", style="bold")
        trainer.should_stop = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Resumed after it had diverged.
        if not _is_finite(pl_module):
            trainer.should_stop = True


class Patience(EarlyStopping):
    """Early stopping from epoch `first` on, not forgotten when a run that had already stopped is resumed."""

    def __init__(self, monitor: str, first: int, **options: Any) -> None:
        super().__init__(monitor, **options)
        self.first = first

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch >= self.first:
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch >= self.first:
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning moves a finished file from the folder for temporary files, which may be on another file system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))


def replay(module: Classifier, options: dict[str, Any]) -> None:
    """Has `module` replay its steps where it can be under the Trainer's `options`."""
    if processes.is_worker():
        return
    reason = hindrance(module, options)
    if reason is None:
        module.step_graph = StepGraph(module)
    else:
        console.print(f"trainer.cuda_graph: off, as {reason}")


def device(accelerator: str) -> torch.device:
    """Where networks and images lie under `trainer.accelerator`."""
    usable = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if usable else "cpu")


def _is_finite(module: pl.LightningModule) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def _quieten() -> None:
    """Lightning's advice and device banners, which a table of results does not need."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore",
        ".*(does not have many workers|Checkpoint directory .* exists|treespec|sync_dist|deterministic implementation)",
    )
