"""What each method, network, sparsity, order and runtime gives, as tables: `make study`.

Every table is one or more sweeps below OUTPUT, whose commands are printed. A study that was interrupted goes on where
it was, and what is finished is not run again. The page of all tables is OUTPUT/study.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from compress.benchmarks.study import Part, page, parts
from compress.cli import main as run
from compress.config.compose import is_for_hydra, key_of
from compress.data.shared import DataSets
from compress.errors import UserError, add_debug, exit_code
from compress.files import write_text
from compress.pipeline.check import checked_jobs


def go_on(study: Sequence[Part]) -> int:
    """Runs what is not finished; a part that fails ends no other. Returns the first exit code that is not 0."""
    unfinished = [sweep for part in study for sweep in part.sweeps if not sweep.finished]
    print(f"{len(unfinished)} sweeps to run; checking one job of each", flush=True)
    data_sets = DataSets()
    for sweep in unfinished[1:]:  # before hours of work; the first checks itself at once
        # The teachers of the study need not be there yet.
        checked_jobs([word for word in sweep.typed[0] if key_of(word) != "teacher.checkpoint"], data_sets=data_sets)
    data_sets.clear()
    failed = 0
    for sweep in unfinished:
        print(f"\n{sweep.command}\n", flush=True)
        launcher = filter(is_for_hydra, sweep.overrides)
        code = run([f"sweep={sweep.directory}", *launcher] if sweep.begun() else sweep.words)
        if code >= 128:  # stopped by a signal
            return code
        failed = failed or code
    return failed


def show(study: Sequence[Part]) -> None:
    for part in study:
        state = "finished" if part.finished else f"about {part.minutes} minutes"
        print(f"{part.name}: {part.title}, {state}", *(sweep.command for sweep in part.sweeps), sep="\n    ")
    hours = sum(part.minutes for part in study if not part.finished) / 60
    print(f"about {hours:.1f} hours for three seeds, two jobs at a time, on two idle cores of an Intel Xeon with AMX")


def main() -> int:
    names = [part.name for part in parts(Path())]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="directory of the sweeps and the page")
    parser.add_argument(
        "overrides", nargs="*", help="KEY=VALUE for every run, such as data.limit=1000 or hydra/launcher=joblib"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--dry-run", action="store_true", help="print the commands and about how long they take")
    parser.add_argument("--page", type=Path, help="run nothing; write the page of what is finished to this file")
    parser.add_argument(
        "--quantizers", type=Path, help="the tables of make quantizer-study, which stand on the page too"
    )
    add_debug(parser)
    arguments = parser.parse_intermixed_args()

    def work() -> int:
        if arguments.seeds < 1:
            raise UserError(f"--seeds: found {arguments.seeds}; accepted: 1 or more")
        study = [
            part
            for part in parts(arguments.output, arguments.overrides, arguments.seeds)
            if part.name in arguments.parts
        ]
        if arguments.dry_run:
            show(study)
            return 0
        code = 0 if arguments.page else go_on(study)
        unfinished = [part.title for part in study if not part.finished]
        if unfinished:
            print(f"not finished, and left out of the page: {', '.join(unfinished)}", file=sys.stderr)
        if len(unfinished) == len(study):
            raise UserError(f"{arguments.output}: found no finished part of the study; accepted: to run one first")
        tables = arguments.quantizers
        quantizers = tables.read_text(encoding="utf-8") if tables and tables.exists() else None
        path = arguments.page or arguments.output / "study.md"
        write_text(path, page(study, quantizers, arguments.overrides))
        print(f"the tables are in {path}")
        return code

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
