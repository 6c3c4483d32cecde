"""The trade-off: one row per variant of the student, as `tradeoff.csv` and as a table for people.

| column | meaning |
|---|---|
| quantizer | `none` for the float32 student, `lsq` for one trained on its grids, otherwise the solver |
| bits | width of the codes of the layers that are neither first nor last, or their mean; 32 for floats |
| levels | values that a weight of those layers can take; empty for floats and mixed precision |
| first_last_bits | width of the first and the last layer |
| activation_bits | width of the activations; 32: not quantized |
| runtime | what ran the file: torch the packed one, onnxruntime an ONNX file |
| sparsity | share of exact zeros among the weights of convolutions and linear layers, 0..1 |
| macs | multiply-accumulates of one image, zeros counted like other weights |
| validation_accuracy, test_accuracy | 0..1, of the model read back from `file`, in float32 by torch |
| agreement | share of test images that get the same class as from the float32 student, 0..1 |
| runtime_agreement | share of test images that get the same class from torch, 0..1; empty for torch itself |
| logit_difference | largest difference of a logit from torch's on the test set; empty for torch itself |
| bytes | size of `file` |
| ratio | bytes of the float32 student over bytes |
| latency_ms, latency_32_ms | median time of 1 and of 32 images on one thread of the CPU, in milliseconds |
| file | relative to the run directory; empty where it was not kept |
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from compress.files import write_atomically

# Of a `result.json`.
DAMAGED = "which cannot be read; accepted: to remove it, and the run goes on from its checkpoints"


@dataclass(frozen=True)
class Row:
    """One variant; the module's docstring says what the columns mean."""

    quantizer: str
    bits: float
    levels: int | None
    first_last_bits: int | None
    activation_bits: int
    runtime: str
    sparsity: float
    macs: int | None = field(default=None, kw_only=True)
    validation_accuracy: float
    test_accuracy: float
    agreement: float
    runtime_agreement: float | None
    logit_difference: float | None
    bytes: int
    ratio: float
    latency_ms: float
    latency_32_ms: float
    file: str

    @property
    def name(self) -> str:
        name = "fp32"
        if self.quantizer != "none":
            mixed = "mixed " if self.levels is None and self.bits < 32 else ""
            inputs = f" a{self.activation_bits}" if self.activation_bits < 32 else ""
            name = f"{self.quantizer} {mixed}{self.bits:.3g} bit{inputs}"
        return name if self.runtime == "torch" else f"{name} {self.runtime}"


def read_rows(record: Mapping[str, Any]) -> list[Row]:
    """The rows in the content of a `result.json`; columns that later versions added are left out.

    Raises KeyError or TypeError where it has none or they lack something.
    """
    names = {each.name for each in fields(Row)}
    return [Row(**{key: value for key, value in row.items() if key in names}) for row in record["tradeoff"]]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, [each.name for each in fields(Row)], lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow({key: _rounded(value) for key, value in asdict(row).items()})

    write_atomically(path, write)


def _rounded(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows for a terminal: accuracies in percent, the change from float32 in points, sizes in kilobytes."""
    reference = rows[0]
    caption = "change: points of test accuracy against fp32; same: test images classified as by fp32; ms: one image"
    printed = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        collapse_padding=True,
        pad_edge=False,
    )
    printed.add_column("variant")
    for heading in ("val %", "test %", "change", "same %", "size kB", "smaller", "ms"):
        printed.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        change = 100 * (row.test_accuracy - reference.test_accuracy)
        colour = "green" if change > -0.5 else "yellow" if change > -2 else "red"
        printed.add_row(
            row.name,
            f"{100 * row.validation_accuracy:.2f}",
            f"{100 * row.test_accuracy:.2f}",
            "" if row is reference else f"[{colour}]{change:+.2f}[/]",
            "" if row is reference else f"{100 * row.agreement:.2f}",
            f"{row.bytes / 1000:,.1f}",
            f"{row.ratio:.1f}x",
            f"{row.latency_ms:.2f}",
        )
    return printed
