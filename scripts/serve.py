"""Serves a page on which a picture shows what each model file answers: `python scripts/serve.py models/*.safetensors`.

The page has the likeliest classes, sizes and milliseconds of all files side by side; the first file is the one that the
others are compared with. A file of a network of one's own class takes it as `network=mynet.MyNet`, a class in the
working directory. It needs the extra `demo`: pip install 'compress[demo]'.
"""

import argparse
import sys
from pathlib import Path

from compress.config import own_parts
from compress.errors import exit_code


def main() -> int:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split()))
    parser.add_argument("files", nargs="+", type=Path, metavar="file", help="model files from a run's models/")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to serve on, such as ::1 (default 127.0.0.1: this machine)"
    )
    parser.add_argument("--port", type=int, default=7860, help="the port, 0 for a free one (default 7860)")
    arguments = own_parts.parse(parser)

    def work() -> None:
        from compress.models import own_class
        from compress.serve import serve

        with own_parts.found(arguments):
            network = None if arguments.network is None else own_class.typed(arguments.network)
            serve(arguments.files, arguments.host, arguments.port, network)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
