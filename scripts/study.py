"""Every method at every width under one budget: `make study`.

What is finished in OUTPUT already is not run again; the table is printed and written to OUTPUT/study.md.
"""

import argparse
import sys
from pathlib import Path

from compress.benchmarks.study_table import study_table
from compress.data.shared import DataSets
from compress.errors import add_debug, exit_code
from compress.files import write_text
from compress.pipeline.check import checked_jobs
from compress.pipeline.execute import execute
from compress.results.tradeoff import Row

TEACHER = ["teacher=resnet20", "teacher.training.epochs=20", "teacher.training.optimizer.lr=1e-2"]
METHODS = {
    "supervised": [[]],
    "kd": [TEACHER],
    "kd_mixup": [TEACHER],
    "dkd": [TEACHER],
    "dml": [[]],
    # Trained anew for each width.
    "qat": [["quantizer=none", f"method.weight_bits={bits}"] for bits in (8, 4, 3, 2)],
}


def study(output: Path, overrides: list[str], seeds: list[int], methods: list[str]) -> str:
    """The table of `methods`, each run below `output`; `overrides` hold for all of them."""
    runs: dict[str, list[list[Row]]] = {method: [] for method in methods}
    data_sets = DataSets()
    for seed in seeds:
        for method in methods:
            rows: list[Row] = []
            for index, variant in enumerate(METHODS[method]):
                typed = ["experiment=fashion_mnist_study", f"method={method}", *variant, f"seed={seed}"]
                typed += [f"output_directory={output}", *overrides]
                [job] = checked_jobs(typed, data_sets=data_sets)
                directory = output / f"{method}-{index}-seed{seed}"
                directory.mkdir(parents=True, exist_ok=True)
                rows += execute(job, directory, data_sets).rows
            # The float weights behind a grid were never meant to be used without it.
            runs[method].append([row for row in rows if method != "qat" or row.quantizer == "lsq"])
    return study_table(runs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="directory for the runs and the table")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE for every run, such as data.limit=1000")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add_debug(parser)
    arguments = parser.parse_args()

    def work() -> None:
        table = study(arguments.output, arguments.overrides, arguments.seeds, arguments.methods)
        write_text(arguments.output / "study.md", table)
        print(table)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
