"""docs/reference.md: every option and key, from the files of conf/, their comments and what receives their values.

`make reference`, that is `python -m compress.config.reference docs/reference.md`, writes it.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from compress.arguments import NOT_ARGUMENTS, UNKNOWN, annotations, dataclass_of, imported, in_words
from compress.config import ranges, roles
from compress.config.help import GROUPS
from compress.optim.groups import DECAY
from compress.paths import CONF

HEAD = """\
# Every option

`group=option` chooses a file of `conf/`, `group.key=value` sets a key, `+group.key=value` adds one that the file does
not name. A value that is not accepted is refused in one line before anything is trained. `python scripts/run.py --help`
lists the groups and their options, `--cfg job` the whole configuration of a command.

This page is written from `conf/` and the code by `make reference`.
"""
NETWORKS = """\
Student, teacher and peer are chosen from the same networks, the files of `conf/model`: `student=resnet8`,
`teacher=resnet50`, `peer=resnet20`. Beside the keys of the network, which lie below `student`, `teacher.model` or
`peer`, they have these.
"""
# The keys of the roles, which have no file to say it.
MEANINGS = {
    "checkpoint": "a file with its weights; null: a student begins with new ones, a teacher is found or trained",
    "pretrained": "published weights: true, or the name of those that are meant",
    "head": "new: all weights of the file but those of the classifier, for other classes",
    "classes": "of a teacher of more classes those of the data, in order, or a file that maps them; null: the same",
    "mean": "of pixels in 0..1, as the teacher's weights know them; null: that of the data",
    "standard_deviation": "likewise",
    "members": "of teacher=ensemble: stems, or mappings of a teacher's keys; their logits are averaged",
    "training.epochs": "of its training, where no weights are given",
    "training.batch_size": "images in a step of it",
    "training.seed": "of its new weights and the order of the images",
    "training.precision": "in which it is trained",
    "training.label_smoothing": "of its cross-entropy",
}
TABLE = "| key | default | takes | |\n|---|---|---|---|\n"
# Recipes, which set keys of other groups.
AS_WRITTEN = ("experiment", "search")
Receiver = Any  # a class, a function, a mapping from key to annotation, or None


@dataclass(frozen=True)
class OptionFile:
    """A YAML file of `conf/`: its lines, and the nodes that it is read into, which know their places in it."""

    path: Path
    lines: list[str]
    root: yaml.MappingNode

    @classmethod
    @cache
    def read(cls, path: Path) -> "OptionFile":
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, yaml.SafeLoader)
        assert isinstance(root, yaml.MappingNode)
        return cls(path, text.splitlines(), root)

    @property
    def shared(self) -> bool:
        """Whether it is no option, but what several options begin with."""
        return self.path.parent.name == "options"

    @property
    def head_length(self) -> int:
        return next(index for index, line in enumerate([*self.lines, ""]) if not line.startswith("#"))

    @property
    def defaults(self) -> list[Any]:
        return [entry for entry in yaml.safe_load("\n".join(self.lines)).get("defaults", []) if entry != "_self_"]

    @property
    def bases(self) -> list["OptionFile"]:
        """The files whose keys this one has, too, the next one first."""
        names = [entry.partition("@")[0] for entry in self.defaults if isinstance(entry, str)]
        found = [OptionFile.read(self.path.parent / f"{name}.yaml") for name in names]
        return [*found, *(base for one in found for base in one.bases)]

    @property
    def siblings(self) -> list["OptionFile"]:
        """All files of its group."""
        folder = self.path.parents[1] if self.shared else self.path.parent
        return [OptionFile.read(path) for path in (*sorted(folder.glob("options/*")), *sorted(folder.glob("*.yaml")))]

    @property
    def receiver(self) -> Receiver:
        """What its keys are passed to."""
        derived = [one for one in self.siblings if self in one.bases] if self.shared else []
        return next((target for one in (self, *self.bases, *derived) if (target := _target(one.root))), None)

    def comment(self, key: yaml.Node, value: yaml.Node) -> str:
        """What the file says of a key: in the lines above it, behind its value, and further in below that."""
        first, column = key.start_mark.line, key.start_mark.column
        end = (key if isinstance(value, yaml.MappingNode) and not value.flow_style else value).end_mark
        above = first
        while above > self.head_length and self.lines[above - 1].startswith(" " * column + "#"):
            above -= 1
        below = end.line + 1
        while below < len(self.lines) and re.match(rf" {{{column + 1},}}#", self.lines[below]):
            below += 1
        behind = re.match(r"[\s:}\]]*(#.*)?", self.lines[end.line][end.column :])
        return _joined([*self.lines[above:first], (behind and behind[1]) or "", *self.lines[end.line + 1 : below]])

    def rows(self, node: yaml.MappingNode, receiver: Receiver, prefix: str) -> Iterator[tuple[str, str, str, str]]:
        """Of every key below `node`: its whole name, the value, what it takes, and what the file says of it."""
        kinds = _kinds(receiver)
        for key, value in node.value:
            if key.value in NOT_ARGUMENTS or key.value == "defaults":
                continue
            name, kind, says = f"{prefix}{key.value}", kinds.get(key.value, UNKNOWN), self.comment(key, value)
            if isinstance(value, yaml.MappingNode) and value.value:
                if says and not value.flow_style:
                    yield name, "", "", says
                yield from self.rows(value, _target(value) or dataclass_of(kind), f"{name}.")
            else:
                written = value.start_mark.buffer[value.start_mark.index : value.end_mark.index]
                yield name, f"`{' '.join(written.split())}`", in_words(kind), says

    def table(self, receiver: Receiver, prefix: str, skipped: str = "") -> Iterator[str]:
        """A key of which the file says nothing means what it means in its bases, or elsewhere in the group."""
        others = [row for one in (*self.bases, *self.siblings) for row in one.rows(one.root, None, prefix)]
        meanings = {name: says for name, _, _, says in reversed(others) if says}
        rows = [row for row in self.rows(self.root, receiver, prefix) if row[0].partition(".")[0] != skipped]
        if rows:
            yield TABLE + "\n".join(_row(*row[:3], row[3] or meanings.get(row[0], "")) for row in rows)


def reference() -> str:
    """The Markdown text of docs/reference.md."""
    run = OptionFile.read(CONF / "run.yaml")
    parts = [HEAD, "## The run", *run.table(ranges.TOP_LEVEL, "", skipped="hydra"), _chosen(run)]
    parts += ["## student, teacher, peer", NETWORKS, _role_keys(), *_options("student", CONF / "model")]
    for group, purpose in {**GROUPS, "search": "what `python scripts/search.py NAME DIRECTORY` goes through"}.items():
        parts += [f"## {group}", f"{_escaped(purpose[0].upper() + purpose[1:]).rstrip('.')}."]
        parts += _options(group, CONF / group)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _chosen(run: OptionFile) -> str:
    """The table of the options that a run has unless others are chosen."""
    [entries] = [value.value for key, value in run.root.value if key.value == "defaults"]
    rows = []
    for group, option in (pair for entry in entries if entry.value != "_self_" for pair in entry.value):
        says = run.comment(group, option) or GROUPS.get(group.value, "the network that is trained and made small")
        rows.append(f"| `{group.value}` | `{option.value}` | {_escaped(says)} |")
    return "\n".join(["| group | default | |", "|---|---|---|", *rows])


def _role_keys() -> str:
    values: dict[str, Any] = {"head": "keep", "pretrained": False, "members": []}
    values |= {f"training.{key}": value for key, value in roles.TRAINING.items()}
    training = {f"training.{key}": kind for key, kind in ranges.TEACHER_TRAINING.items()}
    kinds: dict[str, Any] = {f"student.{key}": kind for key, kind in ranges.STUDENT.items()}
    kinds |= {f"teacher.{key}": kind for key, kind in {**ranges.TEACHER, **ranges.ENSEMBLE, **training}.items()}
    rows = []
    for name, kind in kinds.items():
        key = name.partition(".")[2]
        if key in MEANINGS:
            default = yaml.safe_dump(values.get(key), default_flow_style=True).splitlines()[0]
            rows.append(_row(name, f"`{default}`", in_words(kind), MEANINGS[key]))
    for group, option in (("optimizer", "adamw"), ("scheduler", "onecycle")):
        says = f"{group}@teacher.training.{group}=NAME chooses another, with the keys of [{group}](#{group})"
        rows.append(f"| `teacher.training.{group}` | `{option}` | | {says} |")
    return TABLE + "\n".join(rows)


def _options(group: str, folder: Path) -> Iterator[str]:
    for file in OptionFile.read(next(folder.glob("*.yaml"))).siblings:
        head = file.lines[: file.head_length]
        yield f"### {_heading(group, file)}"
        yield _escaped(_joined(line for line in head if not line.startswith("# @package")))
        body = "\n".join(file.lines[len(head) :]).strip()
        if group not in AS_WRITTEN:
            yield from filter(None, [" ".join(_notes(group, file))])
            yield from file.table(file.receiver, f"{group.replace('/', '.')}.")
        elif body != "{}":
            yield f"```yaml\n{body}\n```"


def _notes(group: str, file: OptionFile) -> Iterator[str]:
    if name := _target_name(file.root):
        yield f"Code: `{name}`."
    if file.bases:
        heading = _heading(group, file.bases[0])
        yield f"It has the keys of [{heading}](#{_anchor(heading)}), too."
    chosen = []
    for key, value in (item for entry in file.defaults if isinstance(entry, Mapping) for item in entry.items()):
        other, _, place = key.removeprefix("override ").lstrip("/").partition("@")
        place = place.removeprefix("_global_.")
        chosen.append(f"`{other if place in ('', other) else f'{other}@{place}'}={value}`")
    if chosen:
        yield f"Unless you choose others: {', '.join(chosen)}."


def _heading(group: str, file: OptionFile) -> str:
    return f"{group}: {file.path.stem}" if file.shared or group == "search" else f"{group}={file.path.stem}"


def _anchor(heading: str) -> str:
    """Where a link finds the heading, on the code host as in MkDocs."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _kinds(receiver: Receiver) -> Mapping[str, Any]:
    if receiver is None or isinstance(receiver, Mapping):
        return receiver or {}
    ours = receiver.__module__.startswith("compress.")
    return {**(annotations(receiver) if ours else ranges.OPTIMIZER | ranges.TRAINER), DECAY: bool}


def _target(node: yaml.MappingNode) -> Receiver:
    name = _target_name(node)
    return None if name is None else imported(name, "_target_")


def _target_name(node: yaml.MappingNode) -> str | None:
    return next((value.value for key, value in node.value if key.value == "_target_"), None)


def _joined(comments: Iterable[str]) -> str:
    return " ".join(text for line in comments if (text := line.strip().removeprefix("#").strip()))


def _row(name: str, value: str, takes: str, says: str) -> str:
    return f"| `{name}` | {value} | {_escaped(takes)} | {_escaped(says)} |"


def _escaped(text: str) -> str:
    """Text in which Markdown sees no emphasis, no link, no tag and no end of a cell."""
    return re.sub(r"([*|\[\]])", r"\\\1", text).replace("<", "&lt;")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
