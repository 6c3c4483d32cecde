"""What scripts that read model files take of the user's own: the class of a network, and a folder of YAML groups.

Nothing here imports Hydra, which they do without.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from compress.errors import add_debug
from compress.paths import import_from_here, searching, user_folder

NETWORK = "network="


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What was typed, with `config_dir`, `debug` and `network`, the class behind `network=` (None: none)."""
    parser.add_argument("--config-dir", metavar="D", help="a folder of YAML files with your own network")
    add_debug(parser)
    typed = [word for word in sys.argv[1:] if word.startswith(NETWORK)]
    arguments = parser.parse_args([word for word in sys.argv[1:] if word not in typed])
    arguments.network = typed[-1].removeprefix(NETWORK) if typed else None
    return arguments


@contextmanager
def found(arguments: argparse.Namespace) -> Iterator[None]:
    """Within it, classes of the working directory and the options of `config_dir` are known.

    Raises UserError where there is no such folder.
    """
    import_from_here()
    with searching([] if arguments.config_dir is None else [user_folder("--config-dir", arguments.config_dir)]):
        yield
