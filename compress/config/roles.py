"""What Hydra has to be told before it composes: the roles that choose from `conf/model`, and our resolvers.

Student, teacher and peer are groups that no file declares.
"""

from collections.abc import Iterable

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from compress.paths import options

# How a teacher is trained where none has been yet.
TRAINING = {"epochs": 8, "batch_size": 64, "seed": 0, "precision": "32-true", "label_smoothing": 0.0}


def register() -> None:
    """Tells Hydra the roles, for every file in a folder `model`, and the resolvers that the YAML files use."""
    stems = options("model")
    store = ConfigStore.instance()
    # The store is one for the whole process, and the user's folders may be others than before.
    if set(store.repo.get("student", ())) != {f"{stem}.yaml" for stem in stems}:
        for role in ("student", "teacher", "peer"):
            store.repo.pop(role, None)
        _store_roles(store, stems)
    OmegaConf.register_new_resolver("when", lambda condition, yes, no: yes if condition else no, replace=True)
    # The paper ramps over 20 of 240 epochs.
    OmegaConf.register_new_resolver("dkd_warmup", _warmup, replace=True)


def _store_roles(store: ConfigStore, stems: Iterable[str]) -> None:
    trained = [{"/optimizer@training.optimizer": "adamw"}, {"/scheduler@training.scheduler": "onecycle"}, "_self_"]
    for stem in stems:
        for role, keys in (("student", {"checkpoint": None, "pretrained": False, "head": "keep"}), ("peer", {})):
            defaults = [f"/model/{stem}@_here_", "_self_"]
            store.store(group=role, name=stem, node={"defaults": defaults, "stem": stem, **keys})
        store.store(
            group="teacher",
            name=stem,
            node={
                "defaults": [{"/model@model": stem}, *trained],
                "model": {"stem": stem},
                "checkpoint": None,
                "pretrained": False,
                "classes": None,
                "mean": None,
                "standard_deviation": None,
                "training": TRAINING,
            },
        )
    store.store(group="teacher", name="ensemble", node={"defaults": trained, "members": [], "training": TRAINING})
    for role in ("teacher", "peer"):
        store.store(group=role, name="none", node={})


def _warmup(epochs: object) -> int:
    """Epochs over which DKD's weight rises; what is no number is left to the check of `trainer.max_epochs`."""
    return min(20, max(1, int(epochs) // 12)) if isinstance(epochs, int | float) else 1
