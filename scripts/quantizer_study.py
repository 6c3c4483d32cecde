"""What the quantizers cost trained networks: `make quantizer-study`, or with run directories of your own.

Every RUN is the directory of a finished run; those of one network under several seeds are averaged. What OUTPUT holds
already is not measured again; the tables are printed and written to OUTPUT/quantizers.md. Where the package `nncodec`
can be imported, the ISO codec is measured too. Names of code that the configuration of a RUN has beside those of conf/
are typed too: allow_targets=[MODULE.CLASS].
"""

import argparse
import sys
from collections.abc import Collection
from pathlib import Path

from compress.benchmarks import nncodec
from compress.benchmarks.quantizer_study import CODED, COMPARED, MAIN, measure, tables
from compress.config.received import ALLOW, allowed_targets
from compress.errors import UserError, add_debug, exit_code
from compress.files import read_json, write_json, write_text
from compress.results.record import FILE, Record


def study(output: Path, runs: list[Path], compare: list[str], allowed: Collection[str] = ()) -> None:
    """Measures the networks of `runs`, those whose stem is among `compare` with every solver, and prints the tables."""
    unfinished = next((run for run in runs if not (run / FILE).is_file()), None)
    if unfinished:
        raise UserError(f"{unfinished}: found no finished run; accepted: directories with a result.json")
    output.mkdir(parents=True, exist_ok=True)
    path = output / "quantizers.json"
    results = read_json(path, "to remove it, and everything is measured again") if path.exists() else {}
    reason = nncodec.missing()
    if reason:
        print(f"nncodec: not measured, because it cannot be imported ({reason})", file=sys.stderr)
    coded = {} if reason else CODED
    for run in runs:
        record = Record.read(run / FILE)
        stem = record.student.model
        known = results.setdefault(stem, {}).setdefault(str(record.seed), {})
        options = MAIN | (COMPARED if stem in compare else {})
        if (options.keys() | coded.keys()) - known.keys():
            measure(run, options, known, lambda: write_json(path, results), allowed, coded)
    table = tables(results)
    write_text(output / "quantizers.md", table)
    print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--compare", nargs="*", default=["resnet20"], help="stems that all solvers are measured on")
    add_debug(parser)
    typed = [word for word in sys.argv[1:] if word.startswith(f"{ALLOW}=")]
    arguments = parser.parse_args([word for word in sys.argv[1:] if word not in typed])
    return exit_code(lambda: study(arguments.output, arguments.runs, arguments.compare, allowed_targets(typed)[0]))


if __name__ == "__main__":
    sys.exit(main())
