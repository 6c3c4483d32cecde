"""Searches for accuracy and few bytes or milliseconds: `python scripts/search.py quickstart outputs/search`."""

import argparse
import sys
from pathlib import Path

from compress.errors import UserError, add_debug, exit_code, printable
from compress.paths import import_from_here, searching
from compress.stopping import StoppedError, stoppable

EPILOG = """\
Every trial is a run of scripts/run.py in OUTPUT/trials/; OUTPUT/pareto.csv and pareto.png show those that no other
beats in validation accuracy and bytes, or latency. The same command goes on with a search that was killed, on to more
trials, or beside another process on the same OUTPUT. compress/sweeps/space.py says what the file of a space may hold.

  python scripts/search.py quickstart outputs/search --trials 20 --processes 2 trainer.max_epochs=5
  python scripts/report.py outputs/search -o search.html
"""


@stoppable()
def search(arguments: argparse.Namespace) -> int:
    """Prints the Pareto set, and on stderr why some trials have no part in it; 1 where that was our fault."""
    # Not at the top: PyTorch takes seconds to import, and help needs none of it.
    from compress.config.compose import searched_folders
    from compress.config.received import allowed_targets
    from compress.sweeps.pareto import COSTS
    from compress.sweeps.search import search
    from compress.sweeps.space import read_space

    import_from_here()
    with searching(searched_folders(arguments.overrides, arguments.config_dir)):
        allowed, overrides = allowed_targets(arguments.overrides)
        space = read_space(arguments.space, overrides, allowed)
        outcome = search(space, arguments.output, arguments.trials, arguments.processes)
    for number, reason in outcome.refused.items():
        print(f"note: trial {number} could not be run: {printable(reason)}", file=sys.stderr)
    for number, reason in outcome.broken.items():
        print(f"warning: trial {number} failed: {printable(reason)}", file=sys.stderr)
    if not outcome.finished and not outcome.unfinished:
        raise UserError(f"{arguments.output}: no trial finished; accepted: a space with others")
    print(
        f"{outcome.finished} of {arguments.trials} trials finished; the Pareto set, of {arguments.output}/pareto.csv:"
    )
    cost = COSTS[space.minimize]
    for point in outcome.pareto:
        row, found = point.row, f"{cost.in_units(point.row):,.2f} {cost.unit}"
        print(f"  {100 * row.validation_accuracy:6.2f} % {found:>14}  trial {point.trial}, {printable(row.name)}")
    if outcome.unfinished:
        print(f"note: {outcome.unfinished} not finished here; the same command goes on with them", file=sys.stderr)
    return int(bool(outcome.broken))


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EPILOG, formatter_class=raw)
    parser.add_argument("space", help="YAML file of the space, or its stem in conf/search")
    parser.add_argument("output", type=Path, help="directory of the search")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every trial, such as data=digits")
    parser.add_argument("--config-dir", metavar="D", help="a folder of YAML files of your own, laid out as conf/")
    parser.add_argument("--trials", type=int, default=20, help="how many there shall be in all (default 20)")
    parser.add_argument("--processes", type=int, default=1, help="how many trials run at once here (default 1)")
    add_debug(parser)
    arguments = parser.parse_intermixed_args()
    try:
        return exit_code(lambda: search(arguments))
    except StoppedError as stopped:
        print(f"{stopped.reason}; the same command goes on", file=sys.stderr)
        return stopped.exit_code


if __name__ == "__main__":
    sys.exit(main())
