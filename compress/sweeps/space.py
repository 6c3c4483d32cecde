"""The YAML of a search: what a trial may be, and that every value of it can be composed, before any work.

| key | meaning |
|---|---|
| sampler | `tpe` or `nsga2`, of Optuna |
| sampler_options | further arguments of it, those of SAMPLERS |
| seed | of the sampler |
| minimize | beside the accuracy, which goes up: `bytes`, or `latency` of an image in the runtimes of `export` |
| overrides | `key=value`, for every trial |
| space | for each key of the command line a list of values, or a mapping as below |

`{low: 1, high: 8, log: true}` is a range of numbers, `type: int` one of whole numbers, and `{choices: [a, b]}` the long
form of a list. `when: {method: [kd, dkd]}` leaves the key out of trials that chose something else.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from compress import yaml_file
from compress.arguments import Count, Seed, check_arguments
from compress.errors import UserError
from compress.paths import option_file, options

Minimized = Literal["bytes", "latency"]
Share = Annotated[float, Field(ge=0, le=1)]
SAMPLERS: dict[str, dict[str, Any]] = {
    "tpe": {"n_startup_trials": Annotated[int, Field(ge=0)], "n_ei_candidates": Count, "constant_liar": bool},
    "nsga2": {
        "population_size": Annotated[int, Field(ge=2)],
        "mutation_prob": Share | None,
        "crossover_prob": Share,
        "swapping_prob": Share,
    },
}
TOP_LEVEL = {
    "sampler": Literal[tuple(SAMPLERS)],
    "sampler_options": dict,
    "seed": Seed,
    "minimize": Minimized,
    "overrides": list[str],
    "space": Annotated[dict, Field(min_length=1)],
}
CHOICES = {"choices": Annotated[list, Field(min_length=1)], "when": dict}
RANGE = {"low": float, "high": float, "log": bool, "type": Literal["float", "int"], "when": dict}
# Whatever needs a key of its own for each run, or would move the runs elsewhere.
NOT_SEARCHED = ("output_directory", "resume", "sweep", "hydra")


@dataclass(frozen=True)
class Values:
    """Values as the command line writes them; `when` has for other keys the values that this one goes with."""

    choices: tuple[str, ...]
    when: Mapping[str, tuple[str, ...]]

    def samples(self) -> tuple[str, ...]:
        """What has to be possible for all of it to be."""
        return self.choices


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; `when` as above."""

    low: float
    high: float
    log: bool
    integer: bool
    when: Mapping[str, tuple[str, ...]]

    def samples(self) -> tuple[str, ...]:
        """The ends and a number between, which is not whole where it does not have to be."""
        if self.integer:
            return (text(self.low), text(self.high))
        between = self.low + (self.high - self.low) / math.e
        return (text(self.low), text(between), text(self.high))


@dataclass(frozen=True)
class Space:
    """A search file and the overrides that were typed beside it."""

    sampler: str
    sampler_options: Mapping[str, Any]
    seed: int
    minimize: Minimized
    overrides: tuple[str, ...]
    dimensions: Mapping[str, Values | Range]

    def content(self) -> dict[str, Any]:
        """All of it as JSON has it, to tell one search from another."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content

    def overrides_of(self, values: Mapping[str, str]) -> list[str]:
        return [*self.overrides, *(f"{key}={value}" for key, value in values.items())]

    def applies(self, key: str, values: Mapping[str, str]) -> bool:
        """Whether `values`, of the keys before it, leave `key` in."""
        return all(values.get(other) in accepted for other, accepted in self.dimensions[key].when.items())


def text(value: Any) -> str:
    """`value` as the command line writes it. Raises TypeError for what is no value there."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(text, value))}]"
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no value of the command line")
    return value if re.fullmatch(r"[\w./+-]+", value) else json.dumps(value, ensure_ascii=False)


def read_space(name: str, typed: Sequence[str] = (), allowed: Collection[str] = ()) -> Space:
    """The search file at path `name`, or of that stem in `conf/search`; `typed` are the overrides beside it.

    One that is given by its path may be somebody else's: `allowed` are names of code that were typed for it. Raises
    UserError for the first thing that is wrong in it, and for what no file may say, see `compress.config.received`.
    """
    is_option = re.fullmatch(r"\w+", name) is not None
    path = option_file("search", name) if is_option else Path(name)
    if path is None or not path.is_file():
        known = ", ".join(options("search"))
        raise UserError(f"space: found no file {name!r}; accepted: a YAML file, or {known}")
    try:
        content = yaml_file.load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as failure:
        mark = getattr(failure, "problem_mark", None)
        place = f" from line {mark.line + 1} on" if mark else ""
        raise UserError(f"space: found {path}, which cannot be read as YAML{place}; accepted: a YAML file") from None
    try:
        space = _space(content, typed)
    except UserError as mistake:
        raise UserError(f"{path}: {mistake}") from None
    if not is_option:
        from compress.config.received import check_overrides  # PyTorch

        chosen = [f"{key}={value}" for key, one in space.dimensions.items() for value in one.samples()]
        check_overrides([*content.get("overrides", ()), *chosen], path, allowed)
    return space


def _space(content: Any, typed: Sequence[str]) -> Space:
    if not isinstance(content, dict):
        raise UserError(f"found {content!r}; accepted: a mapping with {', '.join(TOP_LEVEL)}")
    given = check_arguments(TOP_LEVEL, content, "")
    if "space" not in given:
        raise UserError("space: found none; accepted: a mapping of keys to lists or ranges")
    overrides = (*given.get("overrides", ()), *typed)
    fixed = {_plain(override.partition("=")[0]): override for override in overrides}
    dimensions: dict[str, Values | Range] = {}
    for key, node in given["space"].items():
        if not isinstance(key, str) or _plain(key).split(".")[0] in NOT_SEARCHED or "=" in key:
            raise UserError(f"space.{key}: found a key that cannot be searched; accepted: keys such as optimizer.lr")
        if _plain(key) in fixed:
            raise UserError(f"space.{key}: found {fixed[_plain(key)]!r} beside it; accepted: one of the two")
        dimensions[key] = _dimension(key, node, dimensions)
    sampler = given.get("sampler", "tpe")
    options = check_arguments(SAMPLERS[sampler], given.get("sampler_options", {}), "sampler_options")
    minimize = given.get("minimize", "bytes")
    return Space(sampler, options, given.get("seed", 0), minimize, overrides, dimensions)


def _plain(key: str) -> str:
    return key.lstrip("+~")


def _dimension(key: str, node: Any, before: Mapping[str, Values | Range]) -> Values | Range:
    where = f"space.{key}"
    if isinstance(node, list):
        node = {"choices": node}
    if not isinstance(node, dict):
        raise UserError(f"{where}: found {node!r}; accepted: a list of values, or {{low: 1, high: 8}}")
    given = check_arguments(CHOICES if "choices" in node else RANGE, node, where)
    when = {other: _when(where, other, values, before) for other, values in given.get("when", {}).items()}
    if "choices" in given:
        choices = _texts(where, given["choices"])
        if len(set(choices)) < len(choices):
            raise UserError(f"{where}: found {given['choices']!r}; accepted: every value once")
        return Values(choices, when)
    for end in ("low", "high"):
        if end not in given:
            raise UserError(f"{where}.{end}: found none; accepted: a number, or a list of values instead of a range")
    low, high, log, integer = given["low"], given["high"], given.get("log", False), given.get("type") == "int"
    if low >= high:
        raise UserError(f"{where}: found low {low:g} and high {high:g}; accepted: a low below the high")
    if log and low <= 0:
        raise UserError(f"{where}.low: found {low:g} with log; accepted: a number greater than 0")
    if integer:
        for end in ("low", "high"):
            if not given[end].is_integer():
                raise UserError(f"{where}.{end}: found {given[end]:g} with type int; accepted: a whole number")
        low, high = int(low), int(high)
    return Range(low, high, log, integer, when)


def _texts(where: str, values: Any) -> tuple[str, ...]:
    try:
        return tuple(text(value) for value in values)
    except TypeError as failure:
        raise UserError(f"{where}: found {failure}; accepted: text, numbers, true, false, null and lists") from None


def _when(where: str, other: str, values: Any, before: Mapping[str, Values | Range]) -> tuple[str, ...]:
    lists = {key: dimension.choices for key, dimension in before.items() if isinstance(dimension, Values)}
    if other not in lists:
        accepted = ", ".join(lists) or "none here"
        raise UserError(f"{where}.when.{other}: found no list of that key above it; accepted: {accepted}")
    wanted = _texts(f"{where}.when.{other}", values if isinstance(values, list) else [values])
    wrong = [value for value in wanted if value not in lists[other]]
    if wrong or not wanted:
        first = wrong[0] if wrong else "an empty list"
        raise UserError(f"{where}.when.{other}: found {first}; accepted: {', '.join(lists[other])}")
    return wanted


def check_space(space: Space) -> None:
    """Composes and checks every value of every key (the ends of a range) in some combination with the others.

    Raises UserError with what is wrong with the first value that none of the tried combinations takes.
    """
    # Not at the top: the file itself can be read without PyTorch.
    from compress.data.shared import DataSets
    from compress.pipeline.check import checked_jobs

    data_sets = DataSets()
    problems: dict[tuple[str, ...], str | None] = {}

    def mistake(values: Mapping[str, str]) -> str | None:
        overrides = tuple(space.overrides_of(values))
        if overrides not in problems:
            try:
                [job] = checked_jobs(overrides, data_sets=data_sets)
                if space.minimize == "latency" and {*job.config.export} <= {"packed"}:
                    raise UserError("export: found no runtime to minimize the latency in; accepted: one such as onnx")
                machines = job.config.trainer.get("num_nodes", 1)
                if machines > 1:
                    raise UserError(f"trainer.num_nodes: found {machines} for a search; accepted: 1")
                problems[overrides] = None
            except UserError as failure:
                problems[overrides] = str(failure)
        return problems[overrides]

    for key, dimension in space.dimensions.items():
        for value in dimension.samples():
            mistakes = map(mistake, _attempts(space, key, value))
            first = next(mistakes)
            if first is None or None in mistakes:
                continue
            wants_integers = isinstance(dimension, Range) and not dimension.integer and "whole number" in first
            problem = first if first.startswith(f"{key}:") else f"{key}: {first}"
            raise UserError(f"space.{problem}{' (a range of those has type: int)' if wants_integers else ''}")


def _attempts(space: Space, key: str, value: str) -> Iterator[dict[str, str]]:
    """`value` beside the first values of the other keys, and then with another value of one other key."""
    base = _with_conditions(space, {key: value})
    yield _filled(space, base)
    for other, dimension in space.dimensions.items():
        for changed in dimension.samples()[1:]:
            wanted = _with_conditions(space, {other: changed})
            if other not in base and all(base.get(name, needed) == needed for name, needed in wanted.items()):
                yield _filled(space, base | wanted)


def _with_conditions(space: Space, values: dict[str, str]) -> dict[str, str]:
    """`values` and what has to be chosen for their keys to be there at all."""
    for key in reversed([*space.dimensions]):
        if key in values:
            values = {other: wanted[0] for other, wanted in space.dimensions[key].when.items()} | values
    return values


def _filled(space: Space, values: Mapping[str, str]) -> dict[str, str]:
    filled: dict[str, str] = {}
    for key, dimension in space.dimensions.items():
        if space.applies(key, filled):
            filled[key] = values.get(key, dimension.samples()[0])
    return filled
