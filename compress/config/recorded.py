"""The configuration that a run left in its directory, read again so that the run can go on."""

from collections.abc import Collection, Sequence
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from compress import yaml_file
from compress.checksums import read_text
from compress.config.compose import parse
from compress.config.received import check_content
from compress.config.roles import register
from compress.errors import UserError, first_line
from compress.files import write_yaml


def write_config(directory: Path, config: DictConfig) -> None:
    """Leaves `config` in `directory`, for `read_config` and the reader."""
    write_yaml(directory / "config.yaml", OmegaConf.to_yaml(config, resolve=True))


def read_config(
    directory: Path, allowed: Collection[str] = (), keys: Collection[str] = ("method", "student", "data", "trainer")
) -> DictConfig:
    """The configuration of the run in `directory`, which may be somebody else's.

    `allowed` are names of code that were typed for it; `keys` are those that it has to have. Raises UserError where
    there is none, where it cannot be read, and for what no file may say, see `compress.config.received`.
    """
    path = directory / "config.yaml"
    accepted = "accepted: the directory of a run, or latest"
    if not path.is_file() and (directory / "sweep.yaml").is_file():
        raise UserError(f"resume: found {directory}, the directory of a sweep; accepted: sweep={directory}")
    if not path.is_file():
        raise UserError(f"resume: found no {path}; {accepted}, or the command that made it, which had done nothing yet")
    register()
    try:
        yaml_file.check(read_text(path))
        config = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException):
        raise UserError(f"resume: found {path}, which cannot be read as YAML; {accepted}") from None
    if not isinstance(config, DictConfig) or not {*keys} <= config.keys():
        raise UserError(f"resume: found {path}, which is no configuration of a run; {accepted}")
    check_content(OmegaConf.to_container(config), path, allowed)
    OmegaConf.set_struct(config, True)
    return config


def check_settings(overrides: Sequence[str], resumed: str = "run", accepted: str = "") -> None:
    """Raises UserError for an override that is none of trainer.* and logger.*, which are all that `resumed` takes."""
    for override in overrides:
        if not override.startswith(("trainer.", "logger.")) or "=" not in override:
            raise UserError(
                f"{override}: a resumed {resumed} keeps its configuration; "
                f"accepted: trainer.*=..., logger.*=...{accepted}"
            )


def change(config: DictConfig, overrides: Sequence[str]) -> None:
    """Applies `overrides` of trainer.* and logger.*, which are all that a resumed run takes.

    Raises UserError for any other, for an unknown key, and for the epochs of a run in stages.
    """
    check_settings(overrides)
    for override in overrides:
        if config.get("stages") and override.startswith("trainer.max_epochs="):
            raise UserError(f"{override}: the stages of a resumed run keep their epochs; accepted: other trainer.*=...")
        apply_override(config, override)


def apply_override(config: DictConfig, override: str) -> None:
    """Sets one typed `key=value` in `config`. Raises UserError for an unknown key."""
    try:
        parsed = parse(override)
        OmegaConf.update(config, parsed.key_or_group, parsed.value())
    except (HydraException, OmegaConfBaseException) as failure:
        raise UserError(f"{override}: {first_line(failure)}") from None
