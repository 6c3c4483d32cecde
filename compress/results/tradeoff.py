"""The trade-off: one row per variant of the student, whose columns are declared here and nowhere else.

`tradeoff.csv`, `summary.csv`, the tables in the terminal, in Markdown and on the report's page, and what the loggers
get follow from the fields of `Row`. To add a column, add a field: a figure that is computed from other columns has its
formula in `derive`, one that is measured gets its value in `compress.pipeline.variants`. A field added later needs a
default, so that the rows of earlier runs can still be read.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field
from rich import box
from rich.table import Table

from compress.errors import UserError
from compress.files import write_csv

TABLES = ("terminal", "markdown", "page")


@dataclass(frozen=True)
class Column:
    """What a field of `Row` means and how it is shown; its name and type are those of the field.

    `meaning` is a phrase with the unit of the value in files. A column with a `heading` stands in the `tables` named,
    which print `scale` times the value with `digits` decimals and a `suffix`, and behind what is then below 1
    `below_one`. `deviation`: means over seeds have their sample deviation beside them. `change`: the heading of one
    more column, the difference from the float32 student. `caption`: the table in the terminal explains the heading.
    `loggers`: which of them get the value as `tradeoff/<variant>/<name>`. `derive` computes the value from the other
    columns of a row.
    """

    meaning: str
    heading: str = ""
    tables: tuple[str, ...] = TABLES
    scale: float = 1.0
    digits: int = 2
    suffix: str = ""
    signed: bool = False
    deviation: bool = False
    change: str = ""
    below_one: str = ""
    caption: bool = False
    loggers: Literal["none", "all", "wandb"] = "none"
    derive: Callable[["Row"], Any] | None = None

    def printed(self, value: float | None) -> str:
        """The value as in tables; nothing where it is not known."""
        if value is None:
            return ""
        sign = "+" if self.signed else ""
        mark = self.below_one if self.below_one and round(self.scale * value, self.digits) < 1 else ""
        return f"{self.scale * value:{sign}z,.{self.digits}f}{self.suffix}{mark}"


Share = Annotated[float, Field(ge=0, le=1)]  # files hold 0..1, tables percent
Positive = Field(gt=0)
percent = partial(Column, scale=100)
NARROW = ("terminal", "page")  # Markdown has enough columns


@dataclass(frozen=True)
class Row:
    """One variant: a file, what it holds, and what was measured of the model read back from it.

    Accuracies are None where the images have no labels; the agreement is then what there is.
    """

    quantizer: Annotated[str, Column("`none`: the float32 student; `lsq`: trained on its grids; otherwise the solver")]
    bits: Annotated[
        int | float, Field(ge=0), Column("width of inner layers' codes, or coded bits of a weight; 32: floats")
    ]
    levels: Annotated[int | None, Column("values that a weight there can take; empty: floats or coded bits")]
    first_last_bits: Annotated[int | None, Column("width of the codes of the first and the last layer in bits")]
    activation_bits: Annotated[int, Column("width of the layers' inputs in bits; 32: floats", loggers="wandb")]
    runtime: Annotated[str, Column("what ran the file: torch, onnxruntime, openvino, executorch or litert")]
    sparsity: Annotated[Share, Column("exact zeros in convolutions' and linear layers' weights", loggers="wandb")]
    macs: Annotated[int | None, Column("multiply-accumulates of an image, by zeros too", loggers="wandb")] = field(
        default=None, kw_only=True
    )
    validation_accuracy: Annotated[
        Share | None,
        percent("accuracy on the validation images, in float32", "val %", deviation=True, loggers="all"),
    ]
    test_accuracy: Annotated[
        Share | None,
        percent("accuracy on the test images, in float32", "test %", deviation=True, change="change", loggers="all"),
    ]
    agreement: Annotated[
        Share, percent("test images classified as by fp32", "same %", tables=NARROW, caption=True, loggers="all")
    ]
    runtime_agreement: Annotated[Share | None, Column("test images classified as by torch; empty for torch itself")]
    logit_difference: Annotated[float | None, Column("largest difference from torch's logits on the test set")]
    bytes: Annotated[int, Positive, Column("size of the file in bytes", "size kB", scale=1e-3, digits=1, loggers="all")]
    ratio: Annotated[float, Column("bytes of fp32 over bytes", "smaller", digits=1, suffix="x", loggers="all")]
    latency_ms: Annotated[
        float,
        Column("median milliseconds for an image, one thread", "ms", tables=NARROW, caption=True, loggers="wandb"),
    ]
    latency_32_ms: Annotated[float, Column("median milliseconds for 32 images, one thread", loggers="wandb")]
    speedup: Annotated[
        float | None,
        Column(
            "latency of fp32 in the same runtime over its own, for an image; !: slower",
            heading="speed",
            digits=1,
            suffix="x",
            below_one="!",
            caption=True,
            loggers="wandb",
        ),
    ] = field(default=None, kw_only=True)
    speedup_32: Annotated[float | None, Column("the same for 32 images", loggers="wandb")] = field(
        default=None, kw_only=True
    )
    file: Annotated[str, Column("model file, relative to the run directory; empty where it was not kept")]

    def __post_init__(self) -> None:
        for name, column in COLUMNS.items():
            if column.derive is not None:
                object.__setattr__(self, name, column.derive(self))

    def accuracy_on(self, split: Literal["validation", "test"]) -> float:
        """The accuracy, 0..1, on the images of a `split`. Raises UserError where they had no labels."""
        accuracy = self.validation_accuracy if split == "validation" else self.test_accuracy
        if accuracy is None:
            raise UserError(f"{self.name}: found no accuracy, because the images had no labels")
        return accuracy

    @property
    def trained_on_grids(self) -> bool:
        """Whether the weights were trained on their grids; the float row of such a run was never meant to be used."""
        return self.quantizer == "lsq"

    @property
    def width(self) -> str:
        if self.quantizer == "none":
            return "fp32"
        return f"{float(self.bits):.3} bits/weight" if self.coded else f"{self.bits:.3g} bit"

    @property
    def coded(self) -> bool:
        """Whether it has a rate, and no width. What was trained with only its inputs on grids has 32 bits."""
        return self.levels is None and self.bits < 32

    @property
    def name(self) -> str:
        name = self.width
        if self.quantizer != "none":
            inputs = f" a{self.activation_bits}" if self.activation_bits < 32 else ""
            name = f"{self.quantizer} {self.width}{inputs}"
        return name if self.runtime == "torch" else f"{name} {self.runtime}"


COLUMNS: dict[str, Column] = {
    name: annotation.__metadata__[-1] for name, annotation in get_type_hints(Row, include_extras=True).items()
}


def meanings(columns: Iterable[Column]) -> str:
    """What the headings with a caption mean, as a sentence; nothing where no column has one."""
    said = "; ".join(f"{column.heading}: {column.meaning}" for column in columns if column.caption)
    return said and f"{said[0].upper()}{said[1:]}."


def columns_of(table: str) -> dict[str, Column]:
    """The columns of the `table` (one of TABLES) by key: the name in `Row`, or `<name>_change`."""
    shown = {}
    for name, column in COLUMNS.items():
        if column.heading and table in column.tables:
            shown[name] = column
            if column.change:
                meaning = f"difference of {column.heading} from fp32"
                shown[f"{name}_change"] = replace(
                    column, meaning=meaning, heading=column.change, signed=True, deviation=False, caption=True
                )
    return shown


def figures(
    table: str, value: Callable[[str], float | None], reference: Callable[[str], float | None] | None
) -> dict[str, float | None]:
    """The values of the columns of the `table` by key, given functions that look them up by name.

    reference: for the float32 student, from which changes are measured; without it they are None.
    """

    def change(name: str) -> float | None:
        before, after = None if reference is None else reference(name), value(name)
        return None if before is None or after is None else after - before

    return {key: value(key) if key in COLUMNS else change(key.removesuffix("_change")) for key in columns_of(table)}


def metrics(rows: Sequence[Row], loggers: Literal["all", "wandb"]) -> dict[str, float]:
    """The figures for those `loggers`, as `tradeoff/<variant>/<name>`, as far as they are known."""
    return {
        f"tradeoff/{row.name.replace(' ', '_')}/{name}": float(value)
        for row in rows
        for name, value in asdict(row).items()
        if COLUMNS[name].loggers == loggers and value is not None
    }


def write_tradeoff(path: Path, rows: Sequence[Row]) -> None:
    """Writes every column, floats with six digits."""
    write_csv(path, COLUMNS, [{key: _rounded(value) for key, value in asdict(row).items()} for row in rows])


def _rounded(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows for a terminal; the first is the float32 student, which the others are compared with."""
    values = [
        figures("terminal", partial(getattr, row), None if row is rows[0] else partial(getattr, rows[0]))
        for row in rows
    ]
    empty = {key for key in values[-1] if all(of_row[key] is None for of_row in values)}
    shown = {key: column for key, column in columns_of("terminal").items() if key not in empty}
    printed = Table(
        title=title,
        caption=meanings(shown.values()),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        collapse_padding=True,
        pad_edge=False,
    )
    printed.add_column("variant")
    for column in shown.values():
        printed.add_column(column.heading, justify="right", no_wrap=True)
    for row, of_row in zip(rows, values, strict=True):
        printed.add_row(row.name, *(_cell(column, of_row[key]) for key, column in shown.items()))
    return printed


def _cell(column: Column, value: float | None) -> str:
    text = column.printed(value)
    if column.below_one and text.endswith(column.below_one):
        return f"[red]{text}[/]"
    if not column.signed or value is None:
        return text
    points = column.scale * value
    colour = "green" if points > -0.5 else "yellow" if points > -2 else "red"
    return f"[{colour}]{text}[/]"
