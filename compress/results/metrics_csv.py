"""`metrics.csv`: one row per logged step, one column per metric, kept whole through interruptions.

Lightning's own CSVLogger deletes the history of a run that is resumed; this one continues it, and a step that is
trained again after a crash replaces its row. The last column is a checksum, see `compress.checksums`.
"""

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from compress.checksums import COLUMN, checked_rows, rows_with_checksums
from compress.errors import UserError, first_line
from compress.files import write_csv

FILE = "metrics.csv"


class MetricsCSV(Logger):
    """A Lightning logger that writes `save_dir/metrics.csv`, sorted by step."""

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.path = Path(save_dir) / FILE
        self.rows: dict[int, dict[str, Any]] = {}
        if self.path.exists():
            self.rows = _read(self.path)

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
        rows = rows_with_checksums(self.rows[step] for step in sorted(self.rows))
        write_csv(self.path, [*columns, COLUMN], rows)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def _read(path: Path) -> dict[int, dict[str, Any]]:
    """The rows by their steps. Raises UserError where the file is damaged."""
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = {int(row["step"]): row for row in checked_rows(csv.DictReader(stream, strict=True))}
        for row in rows.values():
            for value in row.values():
                float(value)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as failure:
        raise UserError(
            f"{path}: cannot be read ({first_line(failure)}); accepted: to remove it, and the run goes on without the "
            "metrics of its earlier epochs"
        ) from None
    return rows
