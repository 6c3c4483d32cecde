"""What the keys accept that no constructor of this project declares: those of libraries, and of the run itself."""

from typing import Annotated, Any, Literal

from pydantic import Field

from compress.arguments import BelowOne, Count, NotNegative, Positive, Seed

BatchSize = Annotated[int, Field(ge=2)]
# So many batches, or that share of all.
Batches = Count | Annotated[float, Field(gt=0, le=1)] | None
Text = Annotated[str, Field(min_length=1)]
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"]

TOP_LEVEL = {"seed": Seed, "output_directory": Text, "stages": list[dict[Any, Any]], "grid": dict[str, str]}
STAGE = {
    "name": Annotated[str, Field(pattern=r"^\w[\w-]*$")],
    "share": Annotated[float, Field(gt=0, le=1)] | None,
    "overrides": list[str],
}
OPTIMIZER = {
    "lr": Positive,
    "momentum": BelowOne,
    "dampening": BelowOne,
    "weight_decay": NotNegative,
    "nesterov": bool,
    "betas": Annotated[list[BelowOne], Field(min_length=2, max_length=2)],
    "eps": Positive,
    "amsgrad": bool,
    "fused": bool | None,
}
TRAINER = {
    "max_epochs": Count,
    "accelerator": Literal["auto", "cpu", "gpu", "cuda"],
    "devices": Count | Literal["auto"],
    "num_nodes": Count,
    "strategy": Literal["auto", "ddp"],
    "sync_batchnorm": bool,
    "precision": Literal["auto", Precision],
    "gradient_clip_val": Positive | None,
    "gradient_clip_algorithm": Literal["norm", "value"] | None,
    "accumulate_grad_batches": Count,
    "check_val_every_n_epoch": Count,
    "limit_train_batches": Batches,
    "limit_val_batches": Batches,
    "deterministic": bool | Literal["warn"] | None,
    "benchmark": bool | None,
    "inference_mode": bool,
    "detect_anomaly": bool,
    # These are ours.
    "early_stopping": Count | None,
    "log_every": Annotated[int, Field(ge=0)],
    "compile": bool,
    "cuda_graph": bool,
    "ema_decay": Annotated[float, Field(gt=0, lt=1)] | None,
}
TRAINER_REQUIRED = (
    "max_epochs",
    "accelerator",
    "devices",
    "precision",
    "gradient_clip_val",
    "early_stopping",
    "log_every",
)
# Every other argument of the Trainer: why it is not accepted, and what is instead. docs/trainer.md says it to the user.
_OWN = "which the run sees to itself"
TRAINER_REFUSED = {
    "barebones": ("which leaves a run without checkpoints and metrics", "none"),
    "callbacks": ("which takes objects", "a method of your own"),
    "default_root_dir": (_OWN, "output_directory, hydra.run.dir"),
    "enable_autolog_hparams": ("which would change nothing", "config.yaml, which has every option"),
    "enable_checkpointing": ("without which there is no best epoch", "none"),
    "enable_model_summary": (_OWN, "--dry-run, which shows the networks"),
    "enable_progress_bar": (_OWN, "trainer.log_every"),
    "fast_dev_run": ("which leaves a run without checkpoints", "trainer.max_epochs=1 data.limit=200, or --dry-run"),
    "limit_predict_batches": ("which would change nothing", "scripts/predict.py"),
    "limit_test_batches": ("but each variant meets the whole test set", "data.limit"),
    "log_every_n_steps": ("but metrics are those of whole epochs", "trainer.log_every"),
    "logger": (_OWN, "logger=csv, tensorboard, wandb"),
    "max_steps": ("but schedules and checkpoints are those of whole epochs", "trainer.max_epochs"),
    "max_time": ("which makes the result depend on the machine", "trainer.max_epochs, trainer.early_stopping"),
    "min_epochs": ("which only delays early stopping", "a larger trainer.early_stopping"),
    "min_steps": ("which only delays early stopping", "a larger trainer.early_stopping"),
    "model_registry": ("which is for Lightning's own platform", "logger=wandb, which keeps the models"),
    "num_sanity_val_steps": ("but what can be checked is checked before", "--dry-run"),
    "overfit_batches": ("which validates on training images", "data.limit"),
    "plugins": ("which takes objects", "none"),
    "profiler": ("whose report nothing prints", "a profiler around the command, such as python -m cProfile"),
    "reload_dataloaders_every_n_epochs": ("but the images stay the same", "none"),
    "use_distributed_sampler": ("but the data share the images among processes themselves", "none"),
    "val_check_interval": ("but checkpoints are those of whole epochs", "trainer.check_val_every_n_epoch"),
}
STUDENT = {"checkpoint": Text | None, "head": Literal["keep", "new"], "pretrained": bool | Text}
TEACHER = {
    "model": dict,
    "checkpoint": Text | None,
    "pretrained": bool | Text,
    "classes": list[int | str] | Text | None,
    "mean": list[float] | None,
    "standard_deviation": list[Positive] | None,
    "training": dict,
}
ENSEMBLE = {"members": list, "training": dict}
TEACHER_TRAINING = {
    "epochs": Count,
    "batch_size": BatchSize,
    "seed": Seed,
    "precision": Precision,
    "label_smoothing": BelowOne,
    "optimizer": dict,
    "scheduler": dict,
}
