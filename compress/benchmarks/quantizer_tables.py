"""Quantizers on the same networks and calibration images, as Markdown: the measurements of `make quantizer-study`."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from compress.report.comparison import Statistic, statistic
from compress.report.tables import markdown_table

Measured = Mapping[str, Mapping[str, Any]]
HEAD = ("quantizer", "bits", "validation: change, points", "test: change, points", "mean layer error", "size, kB")


def tables(results: Mapping[str, Mapping[str, Measured]]) -> str:
    """A table per network; `results[stem][seed][name]` has `float`, `rows` and, for each row, `errors`.

    A cell is the mean over the seeds and, from two seeds on, the sample standard deviation.
    """
    return "\n".join(_table(stem, list(seeds.values())) for stem, seeds in results.items())


def _table(stem: str, seeds: Sequence[Measured]) -> str:
    reference = [100 * next(iter(measured.values()))["float"]["test_accuracy"] for measured in seeds]
    lines = []
    for name in dict.fromkeys(name for measured in seeds for name in measured):
        known = [measured[name] for measured in seeds if name in measured]
        for index in range(len(known[0]["rows"])):
            rows = [measured["rows"][index] for measured in known]
            cells = [
                name,
                f"{statistics.mean(row['bits'] for row in rows):.3g}",
                f"{_change(known, index, 'validation_accuracy'):+.2f}",
                f"{_change(known, index, 'test_accuracy'):+.2f}",
                f"{statistics.mean(measured['errors'][index] for measured in known):.3f}",
                f"{statistics.mean(row['bytes'] for row in rows) / 1000:,.1f}",
            ]
            lines.append(cells)
    title = f"{stem}, {len(seeds)} seeds, fp32 {statistic(reference)} % on the test set"
    return f"{title}\n\n{markdown_table(HEAD, lines)}\n"


def _change(seeds: Sequence[Mapping[str, Any]], index: int, column: str) -> Statistic:
    """Of a share, in points against the float network."""
    return statistic([100 * (measured["rows"][index][column] - measured["float"][column]) for measured in seeds])
