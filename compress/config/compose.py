"""Composing the configuration of each job of a command line, and saying in one line why one cannot be composed.

Nothing here imports PyTorch, which takes seconds: a mistyped word is refused before.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from hydra import compose, version
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from compress import yaml_file
from compress.arguments import check_arguments
from compress.config.ranges import TOP_LEVEL
from compress.config.roles import register
from compress.config.run_values import GROUPS
from compress.errors import UserError, first_line
from compress.paths import CONF, of_the_user, options, user_folder, user_folders

if TYPE_CHECKING:
    from torch import nn

SEARCH_PATH = "hydra.searchpath"
# The groups of which a run may have several options at once.
SEVERAL = ("export", "logger", "experiment")


class BoundedFileSource(FileConfigSource):
    """How Hydra reads the files of a folder; here those that `yaml_file` refuses are refused first."""

    def load_config(self, config_path: str) -> ConfigResult:
        path = Path(self.path, self._normalize_file_name(config_path))
        if path.is_file():
            yaml_file.check_file(path)
        return super().load_config(config_path)


@dataclass(frozen=True)
class Job:
    """One run as it was asked for: what was typed and the configuration composed from it.

    `hydra` is that configuration with Hydra's node, which tells where and how the job is run; a job that is read from
    a directory, and a stage, have none. `stages` are the jobs of a run in stages, each in the sub-directory `name`;
    what was typed is in `overrides` of the whole. `networks` are given from Python in place of those that the
    configuration calls `student` and `teacher`.
    """

    overrides: tuple[str, ...]
    config: DictConfig
    hydra: DictConfig | None = None
    stages: tuple["Job", ...] = ()
    name: str = ""
    networks: Mapping[str, "nn.Module"] = field(default_factory=dict)


def compose_jobs(overrides: Sequence[str], multirun: bool = False) -> list[Job]:
    """Every job of a command line, composed. Raises UserError with one line for the first thing that is wrong."""
    register()
    for override in map(parse, overrides):
        if override.is_sweep_override() and not multirun:
            raise UserError(
                f"{override.key_or_group}: found several values, {(override.input_line or '').partition('=')[2]}; "
                "accepted: one, with quotes where a comma is part of it, or -m for a run of each"
            )
    with initialized():
        return _compose_sweep(overrides) if multirun else [compose_job(overrides)]


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """What is typed for each job of a sweep over `overrides`, but for the keys of `grid`; nothing is composed."""
    register()
    with initialized():
        return _expand(overrides)


def parse(override: str) -> Override:
    """`key=value` in Hydra's grammar. Raises UserError where it cannot be read."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        raise UserError(
            f"{override!r}: cannot be read; accepted: key=value, with key=[1,2] for a list and quotes around text "
            "with commas, brackets or equals signs, key=['a=b']"
        ) from None


def key_of(override: str) -> str:
    """The key of `key=value`, without what Hydra takes before it."""
    return override.partition("=")[0].lstrip("+~")


def searched_folders(overrides: Sequence[str], config_dir: str | Path | None = None) -> list[Path]:
    """The folders of the user's own YAML groups: `config_dir` and those in `hydra.searchpath`.

    Raises UserError for one that is not there.
    """
    named = [] if config_dir is None else [("--config-dir", str(config_dir))]
    for override in overrides:
        if key_of(override) == SEARCH_PATH:
            value = parse(override).value()
            places = value if isinstance(value, list) else [value]
            named += [(SEARCH_PATH, str(place)) for place in places if urlsplit(str(place)).scheme in ("", "file")]
    return [user_folder(key, unquote(place.removeprefix("file://"))) for key, place in named]


@contextmanager
def initialized() -> Iterator[None]:
    """Within it, Hydra composes from `conf/` and the user's folders, whatever it was initialized for before."""
    Plugins.instance()
    SourcesRegistry.instance().types[BoundedFileSource.scheme()] = BoundedFileSource
    launchers = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    for stem in options("hydra/launcher"):
        # Hydra would take the node of a published plugin of that name for the schema of ours.
        launchers.pop(f"{stem}.yaml", None)
    GlobalHydra.instance().clear()
    version.setbase("1.3")
    search_path = create_config_search_path(str(CONF))
    for folder in user_folders():
        search_path.prepend("command-line", f"file://{folder}", anchor="schema")
    Hydra.create_main_hydra2(task_name="run", config_search_path=search_path)
    try:
        yield
    finally:
        GlobalHydra.instance().clear()


def compose_job(overrides: Sequence[str]) -> Job:
    """One job; Hydra has to be initialized. Raises UserError for what cannot be composed."""
    for override in overrides:
        _check_choice(override)
    try:
        composed = compose("run", overrides=list(overrides), return_hydra_config=True)
        config = composed.copy()
        with open_dict(config):
            del config["hydra"]
            _add_stems(config, composed.hydra.runtime.choices)
        _check_stems(config, composed.hydra.runtime.choices)
        OmegaConf.resolve(config)
        missing = OmegaConf.missing_keys(config)
    except MissingConfigException as failure:
        group, _, name = str(failure.missing_cfg_file).rpartition("/")
        # Hydra names them for a single option alone, not for one of a list.
        accepted = ", ".join(failure.options or options(group))
        raise UserError(f"{group}: found {name!r}; accepted: {accepted}{of_the_user()}") from None
    except ConfigCompositionException as failure:
        reason = _unknown_key(failure, list(overrides))
        # Where Hydra's own words are all there is, they need not name what was typed.
        raise UserError(_of_override(reason, overrides) if reason == first_line(failure) else reason) from None
    except YAMLError as failure:
        mark = getattr(failure, "problem_mark", None)
        place = f"{mark.name}, line {mark.line + 1}" if mark else "an option"
        raise UserError(f"{place}: found what cannot be read as YAML; accepted: a YAML file") from None
    except (HydraException, OmegaConfBaseException, ValueError) as failure:
        raise UserError(_of_override(first_line(failure), overrides, getattr(failure, "full_key", None))) from None
    if missing:
        raise UserError(f"{min(missing)}: found no value; accepted: {min(missing)}=VALUE")
    typed = tuple(override for override in overrides if not is_for_hydra(override))
    return Job(typed, config, composed)


def _of_override(reason: str, overrides: Sequence[str], key: str | None = None) -> str:
    """`reason`, with the `key` (None: that of the override without which the others can be composed)."""
    suspects = [override for override in overrides if key is None or override.startswith("~")]
    fault = next((override for override in reversed(suspects) if _composes_without(override, overrides)), "")
    typed = key_of(fault) if fault else ""
    if fault.startswith("~"):
        return f"{typed}: found {fault}, which takes away what is needed or not there; accepted: {typed}=VALUE"
    key = key or typed
    return reason if key in reason else f"{key}: {reason}"


def _composes_without(override: str, overrides: Sequence[str]) -> bool:
    with suppress(HydraException, OmegaConfBaseException, ValueError):
        OmegaConf.resolve(compose("run", overrides=[other for other in overrides if other != override]))
        return True
    return False


def _check_choice(override: str) -> None:
    """Raises UserError for an override that gives a group what is no option, which Hydra would take for one.

    A mapping is no choice: it replaces keys of the option that is chosen elsewhere.
    """
    parsed = parse(override)
    group, value = parsed.key_or_group, parsed.value()
    if parsed.is_delete() or isinstance(value, str | dict) or not (group in GROUPS or "/" in group or parsed.package):
        return
    accepted = "one of its options, see --help"
    if group in SEVERAL:
        if isinstance(value, list) and all(isinstance(option, str) for option in value):
            return
        accepted = f"one of its options, see --help, or several, {group}=[OPTION,OPTION]"
    raise UserError(f"{group}: found {override.partition('=')[2]}; accepted: {accepted}")


def is_for_hydra(override: str) -> bool:
    """Whether an override is for Hydra itself, its launcher's among them."""
    return key_of(override).startswith(("hydra.", "hydra/"))


def _add_stems(config: DictConfig, choices: Mapping[str, str]) -> None:
    """Writes into every node with a `_target_` the word that chose it; the nodes of networks have it already."""
    for group, stem in choices.items():
        package = group.partition("@")[2] or group.replace("/", ".")
        # With a slash it is a part of an option, such as data/options.
        if "/" in group or group.startswith(("student", "peer", "model@")):
            continue
        node = OmegaConf.select(config, package)
        if isinstance(node, DictConfig) and "_target_" in node:
            if "stem" in node:
                raise UserError(
                    f"{package}.stem: found {node.stem!r}; accepted: no such key, it is the word of the option"
                )
            node.stem = stem


def _check_stems(config: DictConfig, choices: Mapping[str, str]) -> None:
    """Raises UserError for a network whose `stem` is not the word that chose it."""
    for role, key in (("student", "student"), ("peer", "peer"), ("teacher", "teacher.model")):
        node = OmegaConf.select(config, key)
        if not isinstance(node, DictConfig) or node.get("stem", choices.get(role)) == choices.get(role):
            continue
        raise UserError(f"{key}.stem: found {node.stem!r}; accepted: no such key, {role}=STEM chooses a network")


def _compose_sweep(overrides: Sequence[str]) -> list[Job]:
    """The jobs of a sweep over `overrides`, and over the keys of `grid` in its configuration that are not typed."""
    first, *others = _expand(overrides)
    job = compose_job(first)
    typed = set(map(key_of, overrides))
    check_arguments({"grid": TOP_LEVEL["grid"]}, {"grid": job.config.get("grid")}, "")
    grid = [f"{key}={values}" for key, values in job.config.grid.items() if key not in typed]
    for override in grid:
        parse(override)  # which names it where it cannot be read
    return [compose_job(one) for one in _expand([*overrides, *grid])] if grid else [job, *map(compose_job, others)]


def _expand(overrides: Sequence[str]) -> list[list[str]]:
    try:
        loader = GlobalHydra.instance().config_loader()  # knows the options that glob(*) stands for
        parsed = OverridesParser.create(loader).parse_overrides(list(overrides))
        return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
    except HydraException as failure:
        raise UserError(first_line(failure)) from None


def _unknown_key(failure: ConfigCompositionException, overrides: list[str]) -> str:
    """Hydra says what it could not override; this says what it could."""
    match = re.search(r"Could not [\w ]+\.? '([^']+)'", str(failure))
    if match is None:
        return first_line(failure)
    key = match[1].lstrip("+~")
    others = [override for override in overrides if key_of(override) != key]
    if len(others) == len(overrides):
        return first_line(failure)
    # Of a mapping, the key that was not there.
    inner = getattr(failure.__cause__, "full_key", None) or key
    key = inner if inner.startswith(f"{key}.") else key
    parent = key.rpartition(".")[0]
    # All of a node that is not there cannot be overridden.
    others = [override for override in others if not (parent and key_of(override).startswith(f"{parent}."))]
    try:
        config = compose("run", overrides=others, return_hydra_config=True)
        node = OmegaConf.select(config, parent) if parent else config
    except (HydraException, OmegaConfBaseException):
        return first_line(failure)
    above = parent.rpartition(".")[0]
    around = OmegaConf.select(config, above) if above else config
    if node is None and isinstance(around, DictConfig) and parent.rpartition(".")[2] not in around:
        key, parent, node = parent, above, around  # what is mistyped is the node itself
    if not isinstance(node, DictConfig):
        return f"{key}: found an unknown key; {parent or 'the configuration'} has no keys here"
    accepted = sorted(str(name) for name in node if name not in ("_target_", "_partial_", "stem", "hydra"))
    option = config.hydra.runtime.choices.get(parent)
    of_option = f" of {parent}={option}" if option else ""
    return f"{key}: found an unknown key{of_option}; accepted: {', '.join(accepted) or 'no keys'}"
