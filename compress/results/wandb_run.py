"""`logger=wandb`: one Weights & Biases run for each run directory, from before its data are read to its end.

The run's id lies in the directory, so that a resumed run goes on in the same W&B run.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pydantic import AfterValidator, Field
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from compress.errors import UserError
from compress.files import write_json
from compress.paths import PACKAGE
from compress.results.record import commit
from compress.results.tradeoff import Row
from compress.results.wandb_account import check_account
from compress.stopping import StoppedError

IDENTITY = "wandb.json"
# What the run gets to sort by: the figures of each variant beside those that every logger has.
FIGURES = ("sparsity", "macs", "activation_bits", "latency_ms", "latency_32_ms")
# The drop in validation accuracy up to which a smaller file is the better one.
TOLERATED = 0.01


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
        identity = Path(save_dir, IDENTITY)
        found = json.loads(identity.read_text(encoding="utf-8")) if identity.exists() else {}
        super().__init__(name, save_dir, found.get("id"), project=project)
        self.directory = Path(save_dir).resolve()
        self.log_models = log_models
        self.held: int | None = None
        self.options = {"project": project, "entity": entity, "tags": list(tags), "notes": notes}
        # W&B reads the environment only once in a process.
        self.options["mode"] = "offline" if offline else os.environ.get("WANDB_MODE", "online")
        self.chosen = {"name": name, "group": group, "job_type": job_type}

    @rank_zero_only
    def begin(self, config: DictConfig, overrides: Sequence[str] = ()) -> None:
        """Starts the run, or goes on with it. Raises UserError where W&B does not let it."""
        # Half a second, which runs without W&B need not wait.
        import wandb
        from wandb.sdk.lib.runid import generate_id

        sweep = next((each for each in self.directory.parents if (each / "sweep.yaml").is_file()), None)
        method = config.method.stem
        name = f"{method} {config.student.stem} {config.data._target_.rpartition('.')[2]} seed {config.seed}"
        proposed = {
            "name": name if sweep is None else f"{name} ({self.directory.relative_to(sweep).as_posix()})",
            "group": None if sweep is None else sweep.name,
            "job_type": method,
        }
        about = {"directory": str(self.directory), "commit": commit()}
        identity = {"id": self.version or generate_id()}
        # Before the run is made: a job that is killed now must not leave a run that it cannot find again.
        write_json(self.directory / IDENTITY, identity)
        settings = {"git_root": str(PACKAGE.parent)} if about["commit"] else {}
        # A killed offline run loses up to 15 seconds by default; versions without the setting write at once.
        if "x_transaction_log_flush_interval" in wandb.Settings.model_fields:
            settings["x_transaction_log_flush_interval"] = 0.5
        try:
            self._experiment = wandb.init(
                **self.options,
                **{key: value or proposed[key] for key, value in self.chosen.items()},
                id=identity["id"],
                resume="allow",
                dir=str(self.directory),
                config=OmegaConf.to_container(config, resolve=True) | about,
                # Another active run may be that of whoever called us. The commit is this project's, wherever it runs.
                settings=wandb.Settings(reinit="create_new", **settings),
            )
        except wandb.Error as failure:
            said = " ".join(str(failure).split())
            raise UserError(f"logger.wandb: {said}; accepted: logger.wandb.offline=true, or W&B within reach") from None
        if not self._experiment.offline and self._experiment.url:
            write_json(self.directory / IDENTITY, identity | {"url": self._experiment.url})

    def log_hyperparams(self, params: Any) -> None:
        """The run has the composed configuration, of which these are a part."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """W&B's own steps are ours, so that the epoch that a resumed run repeats is not there twice."""
        self.experiment.log(dict(metrics), step=step)
        self.held = step

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Ends W&B's row of the epoch, which would be held until the next one and lost if the run is killed in it."""
        if self.held is not None:
            self.experiment.log({}, step=self.held, commit=True)
            self.held = None

    @rank_zero_only
    def log_results(self, rows: Sequence[Row], record: Mapping[str, Any]) -> None:
        """The trade-off as table and chart, the pictures, the model files, and the figures to sort runs by."""
        import wandb

        run = self.experiment
        table = wandb.Table(
            columns=["variant", *asdict(rows[0])], data=[[row.name, *asdict(row).values()] for row in rows]
        )
        chart = wandb.plot.scatter(table, "bytes", "test_accuracy", title="test accuracy against bytes")
        pictures = {f"pictures/{path.stem}": wandb.Image(str(path)) for path in sorted(self.directory.glob("*.png"))}
        run.log({"tradeoff": table, "accuracy_against_bytes": chart, **pictures})
        run.summary.update(summary(rows, record))
        for row in rows:
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


@contextmanager
def open_loggers(config: DictConfig, directory: Path, overrides: Sequence[str] = ()) -> Iterator[list[Logger]]:
    """The loggers of `config`; W&B's run is ended when this is left, as failed for an exception.

    overrides: what was typed when the run was started.
    """
    loggers = [instantiate(logger, save_dir=str(directory)) for logger in config.logger.values()]
    runs = [logger for logger in loggers if isinstance(logger, WandbRun)]
    exit_code = 0
    try:
        for run in runs:
            run.begin(config, overrides)
        yield loggers
    except BaseException as failure:
        # 255 is what W&B takes for an interruption.
        exit_code = 255 if isinstance(failure, KeyboardInterrupt | StoppedError) else 1
        raise
    finally:
        for run in runs:
            run.end(exit_code)


def log_results(loggers: Sequence[Logger], rows: Sequence[Row], record: Mapping[str, Any]) -> None:
    """What came out of a run, to those loggers that take more than numbers; W&B's run ends with it.

    So that a run whose upload was interrupted is not finished yet, and resuming it uploads again.
    """
    for logger in loggers:
        if isinstance(logger, WandbRun):
            logger.log_results(rows, record)
            logger.end(0)


def summary(rows: Sequence[Row], record: Mapping[str, Any]) -> dict[str, Any]:
    """The figures one sorts runs by; `rows` has the float32 student first.

    `per_byte/` is the variant with the highest validation accuracy per byte, `smallest/` the smallest file among
    those whose validation accuracy is at most a point below the float32 student's. Neither looks at the test set.
    """
    student, reference = record["student"], rows[0]
    figures = {key: student[key] for key in ("parameters", "macs", "epochs", "best_epoch")}
    figures |= {key: getattr(reference, key) for key in ("validation_accuracy", "test_accuracy", "bytes", "sparsity")}
    figures["seconds"] = sum(record["seconds"].values())
    if record["teacher"]:
        figures["teacher_test_accuracy"] = record["teacher"]["test_accuracy"]
    for row in rows:
        variant = f"tradeoff/{row.name.replace(' ', '_')}"
        figures |= {f"{variant}/{key}": getattr(row, key) for key in FIGURES if getattr(row, key) is not None}
    tolerable = [row for row in rows if row.validation_accuracy >= reference.validation_accuracy - TOLERATED]
    chosen = {
        "per_byte": max(rows, key=lambda row: row.validation_accuracy / row.bytes),
        "smallest": min(tolerable, key=lambda row: row.bytes),
    }
    for which, row in chosen.items():
        figures |= {f"{which}/variant": row.name, f"{which}/points_per_kb": 100e3 * row.test_accuracy / row.bytes}
        figures |= {f"{which}/{key}": getattr(row, key) for key in ("test_accuracy", "bytes", "ratio")}
    return figures
