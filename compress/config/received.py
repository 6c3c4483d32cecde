"""What a file that is read again may say: nothing in it runs code that this installation does not name itself.

The configuration of a run, the overrides of a sweep, of a search and of a stage, and the description of a model file
may come from anybody. Before any of it is resolved or composed it is looked through here. Names of code have to stand
in an option of `conf/` or of the user's own folders, or in the typed `allow_targets=[...]`; of interpolations there
are only those to other keys and the project's own; Hydra's own keys and files outside the folders are out of reach.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from compress import yaml_file
from compress.config.compose import key_of, parse
from compress.config.ranges import TOP_LEVEL
from compress.errors import UserError
from compress.paths import CONF, config_folders, of_the_user

ALLOW = "allow_targets"
# The keys whose values `compress.arguments.imported` is given: Hydra's, and that of a network of the user's own class.
NAMES_CODE = ("_target_", "target")
FROM_PYTHON = "from_python"  # see `compress.pipeline.given`
ROLES = {"student", "teacher", "peer"}
# `${key}` and the resolvers of `compress.config.roles`, without another interpolation in them.
INTERPOLATION = re.compile(r"\$\{(?:(?:when|dkd_warmup):)?[^${}:\\]*\}")

Leaf = tuple[tuple[str, ...], Any]


def check_content(content: Any, source: object, allowed: Collection[str] = ()) -> None:
    """Raises UserError, naming the file `source` and the key, for what the unresolved `content` of it may not say.

    allowed: names of code beside those of the installation.
    """
    _check(_leaves(content), source, allowed)


def check_typed(overrides: Iterable[str]) -> None:
    """Raises UserError for typed overrides that could not be read again from the file of a sweep."""
    for override in overrides:
        value = parse(override).value()
        if isinstance(value, str) and "$" in value and not _is_plain(value):
            raise UserError(
                f"{key_of(override)}: found {value!r}, which sweep=DIRECTORY would not look up; accepted: the value "
                "itself, or an option of your own that has it"
            )


def check_overrides(overrides: Iterable[str], source: object, allowed: Collection[str] = ()) -> None:
    """The same for `key=value` that stand in the file `source`."""
    _check(_leaves_of_all(overrides), source, allowed)


def allowed_targets(overrides: Sequence[str]) -> tuple[frozenset[str], list[str]]:
    """The names in the typed `allow_targets=[...]`, and the other overrides. Raises UserError for anything but names.

    Only what was typed just now may be handed in here.
    """
    names: set[str] = set()
    others = []
    for override in overrides:
        if not override.startswith(f"{ALLOW}="):
            others.append(override)
            continue
        value = parse(override).value()
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise UserError(f"{ALLOW}: found {override.partition('=')[2]}; accepted: a list, {ALLOW}=[MODULE.CLASS]")
        names.update(value)
    return frozenset(names), others


def allowing(content: Any = None, overrides: Iterable[str] = ()) -> list[str]:
    """What has to be typed so that `content` and `overrides`, which are trusted, may be read again; perhaps nothing."""
    plain = OmegaConf.to_container(content, resolve=True) if OmegaConf.is_config(content) else content
    names: set[str] = set()
    with suppress(UserError):  # what no file may say cannot be allowed either
        names.update(text for path, text in _leaves(plain) if _names_code(path, text))
        names.update(text for path, text in _leaves_of_all(overrides) if _names_code(path, text))
    names -= _known()
    return [f"{ALLOW}=[{','.join(sorted(names))}]"] if names else []


def _check(leaves: Iterable[Leaf], source: object, allowed: Collection[str]) -> None:
    known = _known() | {*allowed}
    try:
        texts = [(path, value) for path, value in leaves if isinstance(value, str)]
        # Where nothing is interpolated, a dollar is a dollar.
        interpolates = any("${" in text for _, text in texts)
        for path, text in texts:
            if _names_code(path, text) and text not in known:
                raise UserError(f"{_shown(path)}: found {text!r}, {_way_out(text)}")
            # Stages are overrides, to be read once more when they have been resolved.
            if "$" in text if path[:1] == ("stages",) else interpolates and not _is_plain(text):
                raise UserError(
                    f"{_shown(path)}: found {text!r}, and a file has nothing looked up; accepted: text, or the key of "
                    "another option, ${KEY}"
                )
    except UserError as mistake:
        raise UserError(f"{source}: {mistake}") from None


def _way_out(name: str) -> str:
    if not all(part.isidentifier() for part in name.split(".")):
        return "which is no name of a class; accepted: one that an option of conf/ names"
    typed = f"{ALLOW}=[{name}] on the command line{of_the_user()}"
    return f"which no option of conf/ names; accepted, if you trust it: {typed}"


def _names_code(path: tuple[str, ...], value: Any) -> bool:
    return path[-1:] != () and path[-1] in NAMES_CODE and isinstance(value, str)


def _is_plain(text: str) -> bool:
    """Whether all that a dollar begins in `text` is an interpolation that a file may have."""
    if "\\$" in text:  # which would be one after it was resolved, when nobody looks any more
        return False
    before = ""
    while before != text:
        before, text = text, INTERPOLATION.sub("_", text)
    return "$" not in text


def _leaves(content: Any, path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Path and value of everything below `content` that holds nothing; the overrides of a stage as what they set."""
    if isinstance(content, Mapping):
        # That class is given from Python, and nothing imports it.
        skipped = "target" if content.get(FROM_PYTHON) is True else None
        for key, value in content.items():
            # A mapping that becomes text is looked through for interpolations once more.
            yield (*path, "key"), key
            if key != skipped:
                yield from _leaves(value, (*path, str(key)))
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from _leaves(value, (*path, str(index)))
    else:
        yield path, content
        if isinstance(content, str) and path[:1] == ("stages",) and "overrides" in path:
            yield from _leaves_of(content)


def _leaves_of_all(overrides: Iterable[str]) -> Iterator[Leaf]:
    for override in overrides:
        yield from _leaves_of(override)


def _leaves_of(override: str) -> Iterator[Leaf]:
    """What the `override` of a file sets. Raises UserError where it is not for a file to set."""
    parsed = parse(override)
    key, place = parsed.key_or_group, parsed.package or parsed.key_or_group
    content = parsed.value()
    # A network from Python is none of a file, whose overrides together could say first that it is, and then not.
    if {"hydra", ALLOW, FROM_PYTHON} & {*re.split(r"[./]", f"{key}.{place}"), *_keys(content)}:
        raise UserError(f"{key}: found it in a file; accepted: to type it")
    if parsed.is_sweep_override():
        raise UserError(f"{key}: found several values; accepted: one")
    if "." not in key and key not in TOP_LEVEL:
        # Hydra would compose any YAML file below the folders of options.
        if key not in _groups():
            raise UserError(f"{key}: found it in a file; accepted: a group of conf/, see --help")
        for option in content if isinstance(content, list) else [content]:
            if isinstance(option, str) and ("$" in option or ".." in option.split("/")):
                raise UserError(f"{key}: found {option!r}; accepted: an option, see --help")
    for part in reversed(place.split(".")):
        content = {part: content}
    yield from _leaves(content)


def _keys(content: Any) -> Iterator[str]:
    """The keys of all mappings in `content`."""
    if isinstance(content, Mapping):
        yield from map(str, content)
    for value in content.values() if isinstance(content, Mapping) else content if isinstance(content, list) else ():
        yield from _keys(value)


def _groups() -> set[str]:
    """The folders of options, and the roles that choose from `conf/model`."""
    return {folder.relative_to(CONF).as_posix() for folder in CONF.rglob("*") if folder.is_dir()} | ROLES


def _known() -> frozenset[str]:
    """The names of code that stand in the options of this installation and of the user's own folders."""
    # Not all folders of the user's: a run that somebody sent may lie in one of them.
    files = [file for folder in config_folders() for group in _groups() for file in (folder / group).glob("*.yaml")]
    return frozenset().union(*(_named_in(file, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=1000)
def _named_in(file: Path, changed: int) -> frozenset[str]:
    """The names in one of those files, last `changed` then; one that is damaged names nothing."""
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError, UserError):
        content = yaml_file.load(file.read_text(encoding="utf-8"))
        return frozenset(text for path, text in _leaves(content) if _names_code(path, text))
    return frozenset()


def _shown(path: tuple[str, ...]) -> str:
    return repr(".".join(path))[1:-1]
