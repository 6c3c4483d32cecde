"""Publishes a run: `python scripts/publish.py outputs/runs/X --to DIRECTORY`, or `--to hf:OWNER/NAME`."""

import argparse
import sys
from pathlib import Path

from compress.errors import add_debug, exit_code, printable
from compress.results.publish import publish

EPILOG = """\
The model files and a card (README.md) of what was measured of them, once every file is what the run left. A repository
of the Hugging Face Hub is made where it is not there, and other files in it stay; it takes the extra huggingface and a
token, from `hf auth login` or in HF_TOKEN.

  python scripts/publish.py outputs/runs/2026-07-01_09-00-00 --to digits-resnet18
  python scripts/publish.py RUN --to hf:me/digits-resnet18 --variants fp32 "gpfq 4 bit" --licence apache-2.0 --private
"""


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EPILOG, formatter_class=raw)
    parser.add_argument("run", type=Path, help="the directory of a finished run, or of a quantized checkpoint")
    parser.add_argument("--to", required=True, help="a new or an empty directory, or hf:OWNER/NAME")
    parser.add_argument(
        "--variants", nargs="+", default=[], metavar="NAME", help="as the run's table names them, or their files (all)"
    )
    parser.add_argument("--licence", metavar="ID", help="that of the weights as the Hub names it, such as apache-2.0")
    parser.add_argument("--private", action="store_true", help="a repository that only you see")
    add_debug(parser)
    arguments = parser.parse_args()
    return exit_code(lambda: show(arguments))


def show(arguments: argparse.Namespace) -> None:
    """Publishes, and prints what is where now."""
    where, files = publish(arguments.run, arguments.to, arguments.variants, arguments.licence, arguments.private)
    print(printable(f"{', '.join(file.name for file in files)} in {where}"))


if __name__ == "__main__":
    sys.exit(main())
