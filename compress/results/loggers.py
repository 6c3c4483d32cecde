"""The loggers of a run, opened before its data are read and closed however it ends."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger

from compress.arguments import build
from compress.results.record import Record
from compress.results.tradeoff import Row, metrics
from compress.results.wandb_run import WandbRun
from compress.stopping import StoppedError


@contextmanager
def open_loggers(config: DictConfig, directory: Path) -> Iterator[list[Logger]]:
    """The loggers of `config`; W&B's run is ended when this is left, as failed for an exception."""
    loggers = [build(node, f"logger.{name}", save_dir=str(directory)) for name, node in config.logger.items()]
    runs = [logger for logger in loggers if isinstance(logger, WandbRun)]
    exit_code = 0
    try:
        for run in runs:
            run.begin(config)
        yield loggers
    except BaseException as failure:
        # 255 is what W&B takes for an interruption.
        exit_code = 255 if isinstance(failure, KeyboardInterrupt | StoppedError) else 1
        raise
    finally:
        for run in runs:
            run.end(exit_code)


def log_tradeoff(loggers: Sequence[Logger], rows: Sequence[Row], step: int) -> None:
    """Hands the figures of every variant to every logger, at the training's last `step`."""
    for logger in loggers:
        logger.log_metrics(metrics(rows, "all"), step=step)
        logger.save()


def log_results(loggers: Sequence[Logger], record: Record) -> None:
    """What came out of a run, to those loggers that take more than numbers; W&B's run ends with it.

    So that a run whose upload was interrupted is not finished yet, and resuming it uploads again.
    """
    for logger in loggers:
        if isinstance(logger, WandbRun):
            logger.log_results(record)
            logger.end(0)
