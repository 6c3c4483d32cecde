"""What the quantizers cost trained networks: `make quantizer-study`, or with run directories of your own.

Every RUN is the directory of a finished run; those of one network under several seeds are averaged. What OUTPUT holds
already is not measured again; the tables are printed and written to OUTPUT/quantizers.md.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import OmegaConf

from compress import config as configuration
from compress.errors import UserError
from compress.export.packed import read_model
from compress.files import write_json, write_text
from compress.results.quantizer_study import tables
from compress.variants import Variants

PLAIN = ["quantizer.scale_candidates=1", "quantizer.sweeps=0", "quantizer.refit=false"]
TUNED = ["quantizer.scale_candidates=12", "quantizer.sweeps=4", "quantizer.refit=true"]
ALL, LOW = "quantizer.bits=[8,4,3,2]", "quantizer.bits=[3,2]"
# What is said of it in the table, and the options; those of the first list are measured on every network.
MAIN = {
    "gpfq": ["quantizer=gpfq", *TUNED, ALL],
    "gpfq, all layers": ["quantizer=gpfq", *TUNED, "quantizer.bits=[2]", "quantizer.first_last_bits=null"],
    "gpfq, inputs 8 bit": ["quantizer=gpfq", *TUNED, "quantizer.bits=[8]", "quantizer.activation_bits=8"],
    "gpfq, mixed": ["quantizer=gpfq", *TUNED, "quantizer.bits=[2,3,4,5,6]"],
}
COMPARED = {
    "gpfq, without search and sweeps": ["quantizer=gpfq", *PLAIN, LOW],
    "gpfq, norms re-estimated": ["quantizer=gpfq", *TUNED, LOW, "quantizer.batch_norm_reestimation=true"],
    "gpfq, without bias correction": ["quantizer=gpfq", *TUNED, LOW, "quantizer.bias_correction=false"],
    "gptq": ["quantizer=gptq", *TUNED, LOW],
    "qronos": ["quantizer=qronos", *TUNED, LOW],
    "rtn": ["quantizer=rtn", LOW],
    "published rule, 2^b + 1 levels": [
        *("quantizer=gpfq", *PLAIN, LOW, "quantizer.alphabet=published", "quantizer.scale=percentile"),
        "quantizer.bias_correction=false",
    ],
}


def measure(run: Path, options: dict[str, list[str]], known: dict, save) -> None:
    """Adds to `known` the rows and mean layer errors of every one of `options` for the network of `run`."""
    kept = OmegaConf.load(run / "config.yaml")
    data = instantiate(kept.data, seed=kept.seed)
    data.setup()
    student, about = read_model(run / "models" / "student-fp32.safetensors")
    exported = {"packed": False, "onnx": False}
    with tempfile.TemporaryDirectory() as folder:
        variants = Variants(data, Path(folder), about["architecture"], exported)
        variants.add_float(student)
        for name, overrides in options.items():
            if name in known:
                continue
            if name == "gpfq, mixed":
                size = next(row["bytes"] for row in known["gpfq"]["rows"] if row["bits"] == 3)
                overrides = [*overrides, f"quantizer.budget={size}"]
            typed = [*overrides, "quantizer.calibration_images=512"]
            [(_, composed)] = configuration.compose_jobs(typed, checked=False)
            before = len(variants.rows)
            variants.layers.clear()
            variants.quantize(student, instantiate(composed.quantizer))
            rows = [asdict(row) for row in variants.rows[before:]]
            errors = [_error(layers["quantized"]) for layers in variants.layers.values()]
            known[name] = {"float": asdict(variants.rows[0]), "rows": rows, "errors": errors}
            save()


def _error(layers: dict) -> float:
    """The mean relative output error of the layers that are neither first nor last."""
    inner = [layer["error"] for layer in layers.values()][1:-1]
    return sum(inner) / len(inner)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--compare", nargs="*", default=["resnet20"], help="stems that all solvers are measured on")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "quantizers.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    try:
        for run in arguments.runs:
            if not (run / "result.json").is_file():
                raise UserError(f"{run}: found no finished run; accepted: directories with a result.json")
            record = json.loads((run / "result.json").read_text(encoding="utf-8"))
            stem = record["student"]["model"]
            known = results.setdefault(stem, {}).setdefault(str(record["seed"]), {})
            options = MAIN | (COMPARED if stem in arguments.compare else {})
            if options.keys() - known.keys():
                measure(run, options, known, lambda: write_json(path, results))
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    table = tables(results)
    write_text(arguments.output / "quantizers.md", table)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
