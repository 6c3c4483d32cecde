"""Speed, as ratios of two ways measured in turn in one process: `python scripts/benchmark.py data`."""

import argparse
import sys

from compress.benchmarks import (
    convergence,
    data,
    files,
    gpu,
    optimizers,
    pruning,
    quantization,
    rates,
    report,
    solver,
    step,
    timm_families,
)
from compress.errors import add_debug, exit_code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    for module in (
        convergence,
        data,
        files,
        gpu,
        optimizers,
        pruning,
        quantization,
        rates,
        report,
        solver,
        step,
        timm_families,
    ):
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(name, help=module.__doc__.partition(":")[0], description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    add_debug(parser)
    chosen = parser.parse_args()
    return exit_code(lambda: chosen.run(chosen))


if __name__ == "__main__":
    sys.exit(main())
