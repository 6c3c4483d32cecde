"""What the keys accept that no constructor of this project declares: those of libraries, and of the run itself."""

from typing import Annotated, Literal

from pydantic import Field

from compress.arguments import BelowOne, Count, NotNegative, Positive, Seed

BatchSize = Annotated[int, Field(ge=2)]
Text = Annotated[str, Field(min_length=1)]

TOP_LEVEL = {"seed": Seed, "output_directory": Text, "stages": list[dict], "grid": dict[str, str]}
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
    "precision": Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"],
    "gradient_clip_val": Positive | None,
    "accumulate_grad_batches": Count,
    "early_stopping": Count | None,
    "log_every": Annotated[int, Field(ge=0)],
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
# What `compress.training` gives the Trainer itself, or what would leave a run without its checkpoints.
TRAINER_SUPPLIED = {
    "barebones",
    "callbacks",
    "default_root_dir",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "fast_dev_run",
    "log_every_n_steps",
    "logger",
    "max_steps",
    "num_sanity_val_steps",
    "plugins",
    "use_distributed_sampler",
}
STUDENT = {"checkpoint": Text | None, "head": Literal["keep", "new"]}
TEACHER = {
    "model": dict,
    "checkpoint": Text | None,
    "classes": list[int | str] | None,
    "mean": list[float] | None,
    "standard_deviation": list[Positive] | None,
    "training": dict,
}
ENSEMBLE = {"members": list, "training": dict}
TEACHER_TRAINING = {
    "epochs": Count,
    "batch_size": BatchSize,
    "seed": Seed,
    "precision": TRAINER["precision"],
    "label_smoothing": BelowOne,
    "optimizer": dict,
    "scheduler": dict,
}
