"""The study of `make study`: its parts, each a table from sweeps that can be typed, and the page of their tables.

All of it is Fashion-MNIST and short schedules, so that it ends within 8 hours on two cores.
"""

import shlex
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from compress.config.compose import expand, is_for_hydra, key_of
from compress.errors import UserError
from compress.report.comparison import Group, Variant, statistic, variants
from compress.report.finished import Run, read_run
from compress.report.tables import figure_cells
from compress.results.markdown import markdown_table
from compress.results.tradeoff import columns_of, meanings
from compress.sweeps import jobs

# What a line of a table need not say: it is a mean over the seeds, the part names its teacher, and kept answers of a
# teacher are those that it would give.
NOT_IN_A_LABEL = ("seed", "teacher.checkpoint", "method.teacher_cache")
# Columns that describe a line; where they agree in all lines, they are said once.
ABOUT = ("variant", "epochs", "precision", "seeds")
# What the Makefile types by itself.
SET_BY_MAKE = ("data.root", "hydra/launcher")
# Whatever is typed for the other parts.
QUANTIZERS = (
    "A ResNet-20 of 4 epochs and a ResNet-8x4 of 3, each quantized with 512 images. 54,000 images to train on, 6,000 "
    "to validate on, 10,000 to test on."
)
SPLITS = {"train": "images to train on", "validation": "to validate on", "test": "to test on"}


@dataclass(frozen=True)
class Sweep:
    """The jobs of `overrides` in `directory`."""

    directory: Path
    overrides: tuple[str, ...]

    @property
    def command(self) -> str:
        return shlex.join(["python", "scripts/run.py", *self.words])

    @property
    def words(self) -> list[str]:
        """What is typed behind `python scripts/run.py`."""
        return ["-m", *self.overrides, f"hydra.sweep.dir={self.directory}"]

    @cached_property
    def typed(self) -> list[tuple[str, ...]]:
        """What is typed for each job."""
        return [tuple(word for word in job if not is_for_hydra(word)) for job in expand(self.overrides)]

    def begun(self) -> jobs.Sweep | None:
        """The sweep in its directory, if there is one. Raises UserError where that has other jobs."""
        if not (self.directory / jobs.SWEEP).exists():
            return None
        found = jobs.read(self.directory)
        if list(found.jobs) != self.typed:
            raise UserError(
                f"{self.directory}: found a sweep of other jobs than those of {shlex.join(self.overrides)}; accepted: "
                "the overrides and seeds that it was started with, or another directory for the study"
            )
        return found

    @property
    def finished(self) -> bool:
        found = self.begun()
        return found is not None and not found.missing()


@dataclass(frozen=True)
class Part:
    """A table: what it compares, about how many `minutes` it takes, and its sweeps."""

    name: str
    title: str
    text: str
    minutes: int
    sweeps: tuple[Sweep, ...]

    @property
    def finished(self) -> bool:
        return all(sweep.finished for sweep in self.sweeps)


def parts(output: Path, typed: Sequence[str] = (), seeds: int = 3) -> list[Part]:
    """The parts of the study, whose sweeps lie in `output`, in the order in which they need each other.

    `typed` are overrides that hold in every run, instead of the study's own of the same keys.
    """
    replaced = set(map(key_of, typed))

    def part(name: str, title: str, text: str, minutes: int, *overrides: str) -> Part:
        sweeps = []
        for number, line in enumerate(overrides, 1):
            own = [*line.split(), f"seed={','.join(map(str, range(seeds)))}"]
            kept = (word for word in own if key_of(word) not in replaced)
            sweeps.append(Sweep(output / f"{name}-{number}", (*kept, *typed)))
        return Part(name, title, text, minutes, tuple(sweeps))

    recipe = "experiment=fashion_mnist_resnet20 data.batch_size=64 optimizer.lr=0.05"
    floats = f"{recipe} quantizer=none"
    until_no_better = "scheduler=exponential scheduler.gamma=0.6 trainer.early_stopping=2 trainer.max_epochs=30"
    # The number of a teacher's job is its seed.
    file = "${seed}/models/student-fp32.safetensors"
    narrow = f"teacher=resnet20 teacher.checkpoint={output}/teachers-1/{file}"
    wide = f"teacher=resnet8x4 teacher.checkpoint={output}/teachers-2/{file}"
    # A view of each image for each epoch: the teacher answers as it would in every step, but once for several runs.
    methods = f"{floats} trainer.max_epochs=8 student=resnet8"
    students = f"{floats} trainer.max_epochs=3 student=resnet8,resnet20,resnet8x4,mobilenetv2"
    # Minutes for three seeds, two jobs at a time: from steps in bfloat16 on one core of an Intel Xeon with AMX
    # (images/s: resnet8 2,100, resnet20 860, mobilenetv2 450, resnet8x4 320), and half a minute for what follows.
    return [
        part(
            "teachers",
            "Teachers",
            "Trained on the labels at a falling learning rate, until two epochs in a row are no better on validation. "
            "The ResNet-20 is the teacher of the methods and the orders, the ResNet-8x4 that of the students.",
            80,
            f"{floats} {until_no_better} student=resnet20",
            f"{floats} {until_no_better} student=resnet8x4",
        ),
        part(
            "methods",
            "Methods",
            "A ResNet-8 by each method under one budget; the teacher is the ResNet-20 of the same seed. `qat` trains "
            "on the grids of each width from the start.",
            90,
            f"{methods} method=supervised,dml",
            f"{methods} method=kd,dkd method.teacher_cache=8 {narrow}",
            f"{methods} method=kd loss.standardise=true method.teacher_cache=8 {narrow}",
            f"{methods} method=kd_mixup,at {narrow}",
            f"{methods} method=qat method.weight_bits=8,4,3,2",
        ),
        part(
            "students",
            "Students",
            "Four networks on the labels alone, and from the ResNet-8x4 of the same seed.",
            70,
            f"{students} method=supervised",
            f"{students} method=kd method.teacher_cache=3 {wide}",
        ),
        part(
            "pruning",
            "Pruning",
            "A ResNet-20 with shares of its weights at zero, by magnitude along a schedule, then quantized.",
            45,
            f"{recipe} student=resnet20 trainer.max_epochs=4 pruning=magnitude pruning.sparsity=0,0.5,0.8,0.9 "
            "quantizer.bits=[4,2] quantizer.rates=[1]",
        ),
        part(
            "orders",
            "Orders of stages",
            "A ResNet-8 that is distilled, pruned to 80 % zeros and trained on grids of 8 bits for weights and inputs, "
            "in every order, in as many epochs; the teacher is the ResNet-20 of the same seed.",
            55,
            "experiment=glob(*prune*) data=fashion_mnist optimizer.lr=1e-2 student=resnet8 trainer.max_epochs=5 "
            f"{narrow}",
        ),
        part(
            "runtimes",
            "Eight bits in every runtime",
            "Weights and inputs of 8 bits, the same codes in every runtime, beside float32 in the same runtime.",
            20,
            f"{recipe} student=resnet20,mobilenetv2 trainer.max_epochs=2 quantizer.bits=[8] "
            "quantizer.activation_bits=8 export=[onnx,openvino,executorch,litert]",
        ),
    ]


def page(study: Sequence[Part], quantizers: str | None, typed: Sequence[str] = ()) -> str:
    """The tables of the finished parts as Markdown, each with its commands, and the names of the others.

    `quantizers` are the tables of `make quantizer-study`, where they are there, `typed` what was typed for all runs.
    """
    finished = [part for part in study if part.finished]
    sections = [section for part in finished for section in _section(part)]
    missing = [part.title for part in study if part not in finished]
    if quantizers:
        sections += [
            "## Quantizers and rates",
            textwrap.fill(QUANTIZERS, 120),
            "    make quantizer-study",
            quantizers.strip(),
        ]
    given = shlex.join(word for word in typed if key_of(word) not in SET_BY_MAKE)
    both = f", both with `OVERRIDES={shlex.quote(given)}`" if given else ""
    intro = (
        f"Written by `make figures` from what `make study` has run{both}: Fashion-MNIST and short schedules. "
        "Accuracies in float32 are means ± sample deviations over the seeds; epochs and variants are chosen on "
        "validation, and within a table all lines have the same images. A table is made alone by the commands below "
        "it, once its teachers are there."
    )
    left_out = [f"Not finished, and left out: {'; '.join(missing)}."] if missing else []
    return "\n\n".join(["# Study", textwrap.fill(intro, 120), *left_out, *sections]) + "\n"


def _section(part: Part) -> list[str]:
    runs: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for sweep in filter(None, (sweep.begun() for sweep in part.sweeps)):
        for number, words in enumerate(sweep.jobs):
            key = tuple(word for word in words if key_of(word) != "seed")
            runs[key].append(read_run(sweep.place(number), f"{sweep.directory.name}/{number}", []))
    groups = [Group(tuple(members), (), _label(key, runs), _shown(members)) for key, members in runs.items()]
    said, explained, table = _table(groups)
    images = next(iter(runs.values()))[0].record.data.images
    numbers = [f"{images[split]:,} {what}" for split, what in SPLITS.items() if split in images]
    text = f"{part.text} {', '.join(numbers)}. In every line: {', '.join(said)}. {explained}"
    commands = "\n".join(_wrapped(sweep.command) for sweep in part.sweeps)
    return [f"## {part.title}", textwrap.fill(text, 120), table, commands]


def _wrapped(command: str) -> str:
    """As indented code, in lines that the shell reads as one."""
    lines = textwrap.wrap(command, 110, break_long_words=False, break_on_hyphens=False)
    return textwrap.indent(" \\\n    ".join(lines), "    ")


def _label(words: Sequence[str], runs: Iterable[Sequence[str]]) -> str:
    """The overrides that tell a line from the others."""
    shared = set.intersection(*map(set, runs))
    return " ".join(word for word in words if word not in shared and key_of(word) not in NOT_IN_A_LABEL)


def _table(groups: Sequence[Group]) -> tuple[list[str], str, str]:
    """What all lines have in common, what headings mean, and the table: a line for each variant of each group."""
    lines = [_line(group, variant) for group in groups for variant in group.variants]
    figures = columns_of("markdown").values()
    headings = ("run", *ABOUT, *(column.heading for column in figures))
    columns = dict(zip(headings, zip(*lines, strict=True), strict=True))
    said = [
        f"{heading} {columns[heading][0]}"
        for heading in ABOUT
        if len(set(columns[heading])) == 1 and columns[heading][0]
    ]
    kept = {
        heading: cells
        for heading, cells in columns.items()
        if (len(set(cells)) > 1 if heading in ABOUT else any(cells))
    }
    explained = meanings(column for column in figures if column.heading in kept)
    return said, explained, markdown_table([*kept], zip(*kept.values(), strict=True))


def _shown(runs: Sequence[Run]) -> tuple[Variant, ...]:
    """The variants of equal `runs`, without the float weights behind trained grids."""
    found = variants(runs)
    on_grids = any(variant.row.trained_on_grids for variant in found)
    return tuple(variant for variant in found if not (on_grids and variant.row.quantizer == "none"))


def _line(group: Group, variant: Variant) -> list[str]:
    epochs = statistic([_epochs(run) for run in group.runs])
    precisions = {run.record.hardware.precision or "" for run in group.runs}
    about = [
        variant.row.name,
        "" if epochs is None else f"{epochs:.1f}" if epochs.deviation else f"{epochs.mean:.0f}",
        ", ".join(sorted(precisions)),
        str(len(variant.rows)),
    ]
    return [f"`{group.settings}`" if group.settings else "", *about, *figure_cells(group, variant)]


def _epochs(run: Run) -> int | None:
    """How many were trained, in all stages together."""
    students = [stage.student for stage in run.record.stages] or [run.record.student]
    trained = [student.epochs for student in students]
    return sum(filter(None, trained)) if any(trained) else None
