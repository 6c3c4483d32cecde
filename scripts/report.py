"""All runs on one page: `python scripts/report.py outputs -o outputs/report.html`."""

import argparse
import sys
from pathlib import Path

from compress.errors import add_debug, exit_code, printable
from compress.report.formats import write_reports

EPILOG = """\
The page works without a network: a table to filter and sort, means and deviations over seeds, accuracy against bytes
with the Pareto front, training curves, bits and errors of the layers. Runs that differ in nothing but the seed are
averaged. What cannot be read is named and left out.

  python scripts/report.py outputs -o outputs/report.html -o outputs/report.csv
  python scripts/report.py outputs/sweeps/2026-07-01_09-00-00 -o sweep.md -o sweep.png
"""


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EPILOG, formatter_class=raw)
    parser.add_argument("directories", nargs="+", type=Path, help="run directories, or folders of them at any depth")
    parser.add_argument(
        "-o",
        "--output",
        action="append",
        type=Path,
        metavar="FILE",
        help="what to write: .html, .md (means over seeds), .csv (a line per variant of each run) or .png (accuracy "
        "against bytes, a line per run); may be repeated (default: report.html)",
    )
    add_debug(parser)
    arguments = parser.parse_args()
    outputs = arguments.output or [Path("report.html")]
    return exit_code(lambda: report(arguments.directories, outputs))


def report(directories: list[Path], outputs: list[Path]) -> None:
    """Writes the `outputs`, and says on stderr what was left out of them."""
    collection = write_reports(directories, outputs)
    for problem in collection.problems:
        print(f"warning: {printable(problem)}", file=sys.stderr)
    if collection.unfinished:
        first = printable(str(collection.unfinished[0]))
        print(f"note: {len(collection.unfinished)} not finished and left out, such as {first}", file=sys.stderr)
    count = len(collection.runs)
    print(f"{count} run{'' if count == 1 else 's'} in {', '.join(map(str, outputs))}")


if __name__ == "__main__":
    sys.exit(main())
