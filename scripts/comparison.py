"""This project beside other libraries: `python scripts/comparison.py OUTPUT RUN --peers ours nncf`.

The peers are `ours` and libraries, which have to be installed; every RUN is the directory of a finished run, whose
float32 network is quantized. What OUTPUT/comparison.json holds already is not measured again, so that libraries that
do not go together may have environments of their own. The tables are printed and written to OUTPUT/comparison.md.
Names of code that the configuration of a RUN has beside those of conf/ are typed too: allow_targets=[MODULE.CLASS].
docs/comparison.md has what it found.
"""

import argparse
import sys
from collections.abc import Collection
from pathlib import Path

import torch

from compress.benchmarks.peer_comparison import PEERS, measure, peer_called, tables
from compress.config.received import ALLOW, allowed_targets
from compress.errors import UserError, add_debug, exit_code
from compress.files import read_json, write_json, write_text
from compress.results.record import FILE, Record


def compare(
    output: Path, peers: list[str], runs: list[Path], turns: int, only: str, allowed: Collection[str] = ()
) -> None:
    """Measures what `peers` make of the networks of `runs`, and prints the tables of all that is known."""
    for peer in peers:
        peer_called(peer)
    unfinished = next((run for run in runs if not (run / FILE).is_file()), None)
    if unfinished:
        raise UserError(f"{unfinished}: found no finished run; accepted: directories with a result.json")
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "comparison.json"
    results = read_json(path, "to remove it, and everything is measured again") if path.exists() else {}
    for run in runs:
        known = results.setdefault(Record.read(run / FILE).student.model, {})
        gauge: list[float] = []
        for peer in peers:
            measure(run, peer, known, lambda: write_json(path, results), turns, allowed, only, gauge)
    table = tables(results)
    write_text(output / "comparison.md", table)
    print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["ours"], metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--settings", default="", help="a regular expression that the names of settings have to match")
    parser.add_argument("--turns", type=int, default=1, help="how often each setting quantizes (1)")
    add_debug(parser)
    typed = [word for word in sys.argv[1:] if word.startswith(f"{ALLOW}=")]
    arguments = parser.parse_args([word for word in sys.argv[1:] if word not in typed])

    def work() -> None:
        allowed, _ = allowed_targets(typed)
        compare(arguments.output, arguments.peers, arguments.runs, arguments.turns, arguments.settings, allowed)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
