"""Quantizers on the same networks and calibration images, as Markdown: the measurements of `make quantizer-study`."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Measured = Mapping[str, Mapping[str, Any]]


def tables(results: Mapping[str, Mapping[str, Measured]]) -> str:
    """A table per network; `results[stem][seed][name]` has `float`, `rows` and, for each row, `errors`.

    A cell is the mean over the seeds and, from two seeds on, the sample standard deviation.
    """
    return "\n".join(_table(stem, list(seeds.values())) for stem, seeds in results.items())


def _table(stem: str, seeds: Sequence[Measured]) -> str:
    reference = [100 * next(iter(each.values()))["float"]["test_accuracy"] for each in seeds]
    lines = [
        f"{stem}, {len(seeds)} seeds, fp32 {_cell(reference)} % on the test set",
        "",
        "| quantizer | bits | validation: change, points | test: change, points | mean layer error | size, kB |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(name for each in seeds for name in each):
        own = [each[name] for each in seeds if name in each]
        for index in range(len(own[0]["rows"])):
            bits = statistics.mean(each["rows"][index]["bits"] for each in own)
            cells = [
                _cell([_change(each, index, "validation_accuracy") for each in own], "+.2f"),
                _cell([_change(each, index, "test_accuracy") for each in own], "+.2f"),
                f"{statistics.mean(each['errors'][index] for each in own):.3f}",
                f"{statistics.mean(each['rows'][index]['bytes'] for each in own) / 1000:,.1f}",
            ]
            lines.append(f"| {name} | {bits:.3g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _change(measured: Mapping[str, Any], index: int, column: str) -> float:
    return 100 * (measured["rows"][index][column] - measured["float"][column])


def _cell(values: Sequence[float], form: str = ".2f") -> str:
    text = format(statistics.mean(values), form)
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.2f}"
