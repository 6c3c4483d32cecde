"""`logger=wandb`: one Weights & Biases run for each run directory, from before its data are read to its end.

The run's id lies in the directory, so that a resumed run goes on in the same W&B run.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig
from pydantic import AfterValidator, Field
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from compress import models
from compress.arguments import plain
from compress.errors import UserError
from compress.files import read_json, write_json
from compress.paths import PACKAGE
from compress.results.record import Record
from compress.results.surroundings import commit
from compress.results.tradeoff import COLUMNS, metrics
from compress.results.wandb_account import check_account

IDENTITY = "wandb.json"
# The drop in validation accuracy, 0..1, up to which a smaller file is the better one.
TOLERATED_DROP = 0.01


def _project_name(name: str) -> str:
    if not 1 <= len(name) <= 128 or set(name) & set("/\\#?%:"):
        raise ValueError("1 to 128 characters, none of them / \\ # ? % :")
    return name


def _tag(text: str) -> str:
    if not 1 <= len(text) <= 64:
        raise ValueError("a list of texts of 1 to 64 characters")
    return text


Text = Annotated[str, Field(min_length=1)]


class WandbRun(WandbLogger):
    """Lightning's W&B logger with a run that is begun and ended here; other active runs of the process are not used.

    `group`, `job_type` and `name` are, where they are not given, the name of the sweep's directory, the method, and
    method, student, data, seed and number in the sweep. `log_models`: the files of `models/` go along as artifacts.
    """

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Raises UserError where a run with these `options` could not begin."""
        check_account(bool(options.get("offline")))

    def __init__(
        self,
        save_dir: str,
        project: Annotated[str, AfterValidator(_project_name)] = "compress",
        entity: Text | None = None,
        name: Text | None = None,
        group: Text | None = None,
        job_type: Text | None = None,
        tags: Sequence[Annotated[str, AfterValidator(_tag)]] = (),
        notes: str | None = None,
        offline: bool = False,
        log_models: bool = True,
    ) -> None:
        path = Path(save_dir, IDENTITY)
        identity = read_json(path, "to remove it, and W&B gets a new run") if path.exists() else {}
        super().__init__(name, save_dir, identity.get("id"), project=project)
        self.directory = Path(save_dir).resolve()
        self.log_models = log_models
        self.open_step: int | None = None  # the step whose row W&B has not ended yet
        self.options: dict[str, Any] = {"project": project, "entity": entity, "tags": list(tags), "notes": notes}
        # W&B reads the environment only once in a process.
        self.options["mode"] = "offline" if offline else os.environ.get("WANDB_MODE", "online")
        self.chosen = {"name": name, "group": group, "job_type": job_type}

    @rank_zero_only
    def begin(self, config: DictConfig) -> None:
        """Starts the run, or goes on with it. Raises UserError where W&B does not let it."""
        # Half a second, which runs without W&B need not wait.
        import wandb
        from wandb.sdk.lib.runid import generate_id

        about = {"directory": str(self.directory), "commit": commit()}
        identity = {"id": self.version or generate_id()}
        # Before the run is made: a job that is killed now must not leave a run that it cannot find again.
        write_json(self.directory / IDENTITY, identity)
        settings: dict[str, Any] = {"git_root": str(PACKAGE.parent)} if about["commit"] else {}
        # A killed offline run loses up to 15 seconds by default; versions without the setting write at once.
        if "x_transaction_log_flush_interval" in wandb.Settings.model_fields:
            settings["x_transaction_log_flush_interval"] = 0.5
        try:
            self._experiment = wandb.init(
                **self.options,
                **self._names(config),
                id=identity["id"],
                resume="allow",
                dir=str(self.directory),
                config=plain(config) | about,
                # Another active run may be that of whoever called us. The commit is this project's, wherever it runs.
                settings=wandb.Settings(reinit="create_new", **settings),
            )
        except wandb.Error as failure:
            reason = " ".join(str(failure).split())
            raise UserError(
                f"logger.wandb: {reason}; accepted: logger.wandb.offline=true, or W&B within reach"
            ) from None
        if not self._experiment.offline and self._experiment.url:
            write_json(self.directory / IDENTITY, identity | {"url": self._experiment.url})

    def _names(self, config: DictConfig) -> dict[str, Any]:
        """Name, group and job type, as they were chosen or as they follow from the configuration."""
        sweep = next((folder for folder in self.directory.parents if (folder / "sweep.yaml").is_file()), None)
        name = f"{config.method.stem} {models.label(config.student)} {config.data.stem} seed {config.seed}"
        if sweep is not None:
            name += f" ({self.directory.relative_to(sweep).as_posix()})"
        proposed = {"name": name, "group": None if sweep is None else sweep.name, "job_type": config.method.stem}
        return {key: self.chosen[key] or value for key, value in proposed.items()}

    def log_hyperparams(self, params: Any) -> None:
        """The run has the composed configuration, of which these are a part."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """W&B's own steps are ours, so that the epoch that a resumed run repeats is not there twice."""
        self.experiment.log(dict(metrics), step=step)
        self.open_step = step

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Ends W&B's row of the epoch, which would be held until the next one and lost if the run is killed in it."""
        if self.open_step is not None:
            self.experiment.log({}, step=self.open_step, commit=True)
            self.open_step = None

    @rank_zero_only
    def log_results(self, record: Record) -> None:
        """The trade-off as table and chart, the pictures, the model files, and the figures to sort runs by."""
        import wandb

        run = self.experiment
        table = wandb.Table(
            columns=["variant", *COLUMNS], data=[[row.name, *asdict(row).values()] for row in record.rows]
        )
        chart = wandb.plot.scatter(table, "bytes", "test_accuracy", title="test accuracy against bytes")
        pictures = {f"pictures/{path.stem}": wandb.Image(str(path)) for path in sorted(self.directory.glob("*.png"))}
        run.log({"tradeoff": table, "accuracy_against_bytes": chart, **pictures})
        run.summary.update(summary(record))
        for row in record.rows:
            if self.log_models and row.file:
                path = self.directory / row.file
                artifact = wandb.Artifact(f"{path.name}-{run.id}", type="model", metadata=asdict(row))
                # Uploaded from where it lies: a copy would stay in the user's home.
                artifact.add_file(str(path), policy="immutable", skip_cache=True)
                run.log_artifact(artifact)

    @rank_zero_only
    def end(self, exit_code: int) -> None:
        """Waits until everything is uploaded. The run would otherwise last as long as the process."""
        run, self._experiment = self._experiment, None
        if run is not None:
            run.finish(exit_code=exit_code)


def summary(record: Record) -> dict[str, Any]:
    """The figures one sorts runs by.

    `per_byte/` is the variant with the highest validation accuracy per byte, `smallest/` the smallest file among
    those whose validation accuracy is at most a point below the float32 student's. Neither looks at the test set.
    """
    student, rows = record.student, record.rows
    reference = rows[0]
    figures = {key: getattr(student, key) for key in ("parameters", "macs", "epochs", "best_epoch")}
    figures |= {key: getattr(reference, key) for key in ("validation_accuracy", "test_accuracy", "bytes", "sparsity")}
    figures["seconds"] = sum(record.seconds.values())
    if record.teacher:
        figures["teacher_test_accuracy"] = record.teacher.test_accuracy
    figures |= metrics(rows, "wandb")
    least = reference.accuracy_on("validation") - TOLERATED_DROP
    tolerable = [row for row in rows if row.accuracy_on("validation") >= least]
    chosen = {
        "per_byte": max(rows, key=lambda row: row.accuracy_on("validation") / row.bytes),
        "smallest": min(tolerable, key=lambda row: row.bytes),
    }
    for which, row in chosen.items():
        points = 100e3 * row.accuracy_on("test") / row.bytes
        figures |= {f"{which}/variant": row.name, f"{which}/points_per_kb": points}
        figures |= {f"{which}/{key}": getattr(row, key) for key in ("test_accuracy", "bytes", "ratio")}
    return figures
