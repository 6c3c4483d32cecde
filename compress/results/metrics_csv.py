"""`metrics.csv`: one row per logged step, one column per metric, kept whole through interruptions.

Lightning's own CSVLogger deletes the history of a run that is resumed; this one continues it, and a step that is
trained again after a crash replaces its row.
"""

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from compress.files import write_csv


class MetricsCSV(Logger):
    """A Lightning logger that writes `save_dir/metrics.csv`, sorted by step."""

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self.rows: dict[int, dict[str, Any]] = {}
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as stream:
                for row in csv.DictReader(stream):
                    self.rows[int(row["step"])] = {key: value for key, value in row.items() if value != ""}

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The composed configuration lies beside the metrics, in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = 0 if step is None else step
        self.rows.setdefault(step, {"step": step}).update(metrics)

    @rank_zero_only
    def save(self) -> None:
        """Writes the file; Lightning calls it as often as it flushes other loggers."""
        if not self.rows:
            return
        columns = ["step", "epoch", *sorted({key for row in self.rows.values() for key in row} - {"step", "epoch"})]
        write_csv(self.path, columns, [self.rows[step] for step in sorted(self.rows)])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()
