"""What the quantizers cost trained networks: what `make quantizer-study` measures, and its tables."""

import statistics
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from compress.benchmarks import nncodec
from compress.benchmarks.bytes_at_drop import CODEC, RATES, drop_table
from compress.config.compose import compose_jobs
from compress.config.recorded import read_config
from compress.data.module import DataModule
from compress.evaluation import evaluate
from compress.export.packed import read_model
from compress.pipeline.parts import Parts
from compress.pipeline.variants import Variants
from compress.report.comparison import Statistic, statistic
from compress.results.markdown import markdown_table

Measured = Mapping[str, Mapping[str, Any]]
HEAD = ("quantizer", "bits", "validation: change, points", "test: change, points", "mean layer error", "size, kB")
PLAIN = [f"quantizer.refinement.{option}" for option in ("scale_candidates=1", "sweeps=0", "refit=false")]
TUNED = [f"quantizer.refinement.{option}" for option in ("scale_candidates=12", "sweeps=4", "refit=true")]
ALL, LOW = "quantizer.bits=[8,4,3,2]", "quantizer.bits=[3,2]"
MANY_RATES = ["quantizer.bits=[]", "quantizer.rates=[3,2.5,2.04,1.7,1.4,1.2,1.03,0.87,0.74,0.6]"]
LOW_RATES = ["quantizer.bits=[]", "quantizer.rates=[1.4,1.03,0.74,0.6]"]
HIGH_RATES = ["quantizer.bits=[]", "quantizer.rates=[2.5,2.04,1.7,1.4,1.03]"]
SURVIVORS, TUNE = "quantizer.refinement.survivors=8", "quantizer.tune={}"
COUPLED = "quantizer.refinement.coupled_rows=true"
# Names in the table, and options; those of the first list are measured on every network.
MAIN = {
    "gpfq": ["quantizer=gpfq", *TUNED, ALL],
    "gpfq, all layers": ["quantizer=gpfq", *TUNED, "quantizer.bits=[2]", "quantizer.first_last_bits=null"],
    "gpfq, inputs 8 bit": ["quantizer=gpfq", *TUNED, "quantizer.bits=[8]", "quantizer.activation_bits=8"],
    "gpfq, rates": ["quantizer=gpfq", *TUNED, *MANY_RATES],
    f"{RATES}, 8 survivors": ["quantizer=gpfq", *TUNED, *LOW_RATES, SURVIVORS],
    f"{RATES}, 8 survivors, tuned": ["quantizer=gpfq", *TUNED, *HIGH_RATES, SURVIVORS, TUNE],
    f"{RATES}, coupled rows": ["quantizer=gpfq", *TUNED, *MANY_RATES, COUPLED],
    f"{RATES}, tuned": ["quantizer=gpfq", *TUNED, *LOW_RATES, TUNE],
    # Within the size of 3 bit.
    "gpfq, budget": ["quantizer=gpfq", *TUNED],
}
COMPARED = {
    "gpfq, without search and sweeps": ["quantizer=gpfq", *PLAIN, LOW],
    "gpfq, norms re-estimated": ["quantizer=gpfq", *TUNED, LOW, "quantizer.correction.batch_norm=true"],
    "gpfq, without bias correction": ["quantizer=gpfq", *TUNED, LOW, "quantizer.correction.bias=false"],
    "gpfq, 8 survivors": ["quantizer=gpfq", *TUNED, LOW, SURVIVORS],
    "gptq": ["quantizer=gptq", *TUNED, LOW],
    "qronos": ["quantizer=qronos", *TUNED, LOW],
    "rtn": ["quantizer=rtn", LOW],
    "published rule, 2^b + 1 levels": [
        *("quantizer=gpfq", *PLAIN, LOW, "quantizer.grid.alphabet=published", "quantizer.grid.scale=percentile"),
        "quantizer.correction.bias=false",
    ],
}
# Names in the table, and quantization parameters: 215 to 40 kB for a ResNet-20, closest where its accuracy falls.
CODED = {f"{CODEC}, qp {qp}": qp for qp in (-38, -34, -30, -28, *range(-26, -16), -14)}


def measure(
    run: Path,
    options: Mapping[str, Sequence[str]],
    known: dict[str, Any],
    save: Callable[[], None],
    allowed: Collection[str] = (),
    coded: Mapping[str, int] | None = None,
) -> None:
    """Adds to `known` the rows and mean layer errors of every one of `options` for the network of `run`.

    coded: quantization parameters of NNCodec, as in `CODED`, which are measured too. What is known already is not
    measured again; `save` is called after each one that is. `allowed` as in `read_config`.
    """
    data = Parts(read_config(run, allowed)).data
    student, about = read_model(run / "models" / "student-fp32.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        variants = Variants(data, Path(folder), about["architecture"], exporters=[])
        variants.add_float(student)
        for name, overrides in options.items():
            if name in known:
                continue
            if name == "gpfq, budget":
                size = next(row["bytes"] for row in known["gpfq"]["rows"] if row["bits"] == 3)
                overrides = [*overrides, f"quantizer.budget={size}"]
            typed = [*overrides, "quantizer.calibration_images=512"]
            [job] = compose_jobs(typed)
            before = len(variants.rows)
            variants.layers.clear()
            quantizer = Parts(job.config).quantizer
            assert quantizer is not None  # each of the options names one
            variants.quantize(student, quantizer)
            rows = [asdict(row) for row in variants.rows[before:]]
            errors = [_error(layers["quantized"]) for layers in variants.layers.values()]
            known[name] = {"float": asdict(variants.rows[0]), "rows": rows, "errors": errors}
            save()
        for name, qp in (coded or {}).items():
            if name not in known:
                row = _coded_row(student, qp, data)
                known[name] = {"float": asdict(variants.rows[0]), "rows": [row], "errors": [None]}
                save()


def _coded_row(student: nn.Module, qp: int, data: DataModule) -> dict[str, Any]:
    """What `Row` has of a file, for `student` through NNCodec; the size is that of the bitstream."""
    decoded, size = nncodec.coded(student, qp)
    decoded = decoded.to(data.device)
    validation = evaluate(decoded, data.val_dataloader(), data.num_classes).accuracy
    test = evaluate(decoded, data.test_dataloader(), data.num_classes).accuracy
    accuracies = {"validation_accuracy": validation, "test_accuracy": test}
    return {"quantizer": CODEC, "bits": None, "levels": None, "bytes": size, **accuracies}


def _error(layers: Mapping[str, Any]) -> float:
    """The mean relative output error of the layers that are neither first nor last."""
    inner: list[float] = [layer["error"] for layer in layers.values()][1:-1]
    return sum(inner) / len(inner)


def tables(results: Mapping[str, Mapping[str, Measured]]) -> str:
    """Two tables per network, its rows and `drop_table`; `results[stem][seed][name]` has `float`, `rows`, `errors`.

    A cell of the rows is the mean over the seeds and, from two seeds on, the sample standard deviation. There is an
    error for each row, None for one of NNCodec.
    """
    networks = {stem: list(seeds.values()) for stem, seeds in results.items()}
    return "\n".join(f"{_table(stem, seeds)}\n{drop_table(stem, seeds)}" for stem, seeds in networks.items())


def _table(stem: str, seeds: Sequence[Measured]) -> str:
    reference = [100 * next(iter(measured.values()))["float"]["test_accuracy"] for measured in seeds]
    lines = []
    for name in dict.fromkeys(name for measured in seeds for name in measured):
        known = [measured[name] for measured in seeds if name in measured]
        for index in range(len(known[0]["rows"])):
            rows = [measured["rows"][index] for measured in known]
            cells = [
                name,
                _mean([row["bits"] for row in rows], ".3g"),
                f"{_change(known, index, 'validation_accuracy'):+z.2f}",
                f"{_change(known, index, 'test_accuracy'):+z.2f}",
                _mean([measured["errors"][index] for measured in known], ".3f"),
                f"{statistics.mean(row['bytes'] for row in rows) / 1000:,.1f}",
            ]
            lines.append(cells)
    title = f"{stem}, {len(seeds)} seeds, fp32 {statistic(reference)} % on the test set"
    return f"{title}\n\n{markdown_table(HEAD, lines)}\n"


def _mean(values: Sequence[float | None], form: str) -> str:
    known = statistic(values)
    return "" if known is None else f"{known.mean:{form}}"


def _change(seeds: Sequence[Mapping[str, Any]], index: int, column: str) -> Statistic:
    """Of a share, in points against the float network."""
    return Statistic.of([100 * (measured["rows"][index][column] - measured["float"][column]) for measured in seeds])
