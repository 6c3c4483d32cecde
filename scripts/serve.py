"""Serves a page on which a picture shows what each model file answers: `python scripts/serve.py models/*.safetensors`.

The page has the likeliest classes, sizes and milliseconds of all files side by side; the first file is the one that the
others are compared with. A file of a network of one's own class takes it as `network=mynet.MyNet`, a class in the
working directory. It needs the extra `demo`: pip install 'compress[demo]'.
"""

import argparse
import sys
from pathlib import Path

from compress.errors import add_debug, exit_code
from compress.paths import import_from_here, searching

NETWORK = "network="


def main() -> int:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split()))
    parser.add_argument("files", nargs="+", type=Path, metavar="file", help="model files from a run's models/")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to serve on, such as ::1 (default 127.0.0.1: this machine)"
    )
    parser.add_argument("--port", type=int, default=7860, help="the port, 0 for a free one (default 7860)")
    parser.add_argument("--config-dir", type=Path, metavar="D", help="a folder of YAML files with your own network")
    typed = [word for word in sys.argv[1:] if word.startswith(NETWORK)]
    add_debug(parser)
    arguments = parser.parse_args([word for word in sys.argv[1:] if word not in typed])
    name = typed[-1].removeprefix(NETWORK) if typed else None
    folders = [] if arguments.config_dir is None else [arguments.config_dir]
    import_from_here()

    def work() -> None:
        from compress.models import own_class
        from compress.serve import serve

        network = None if name is None else own_class.typed(name)
        serve(arguments.files, arguments.host, arguments.port, network)

    with searching(folders):
        return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
