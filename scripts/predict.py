"""Classifies images with a model file: `python scripts/predict.py model.safetensors cat.png dog.jpg --top 3`.

A file of a network of one's own class takes it as `network=mynet.MyNet`, a class in the working directory.
"""

import argparse
import json
import sys

from compress.config import own_parts
from compress.errors import UserError, exit_code, printable
from compress.models import own_class
from compress.predict import Predictor, pictures


def main() -> int:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split()))
    parser.add_argument("file", help="a model file from a run's models/")
    parser.add_argument("images", nargs="+", help="image files of any size, or folders of them")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="print the K likeliest classes (default 1)")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    arguments = own_parts.parse(parser)

    def work() -> None:
        with own_parts.found(arguments):
            predict(arguments)

    return exit_code(work)


def predict(arguments: argparse.Namespace) -> None:
    """Prints the classes of the images, as lines or as JSON. Raises UserError at the end where some were not read."""
    network = None if arguments.network is None else own_class.typed(arguments.network)
    predictor, files = Predictor.read(arguments.file, network=network), pictures(arguments.images)
    content, unread = [], []
    for answer in predictor.answers(files, arguments.top):
        if isinstance(answer, UserError):
            unread.append(answer)
            if len(files) > 1:
                print(f"error: {printable(str(answer))}", file=sys.stderr)
            continue
        pairs = list(zip(answer.classes, answer.probabilities, strict=True))
        if arguments.json:
            classes = [{"class": name, "probability": value} for name, value in pairs]
            content.append({"path": answer.path, "classes": classes})
        else:
            classes = ", ".join(f"{name} {100 * value:.1f} %" for name, value in pairs)
            print(printable(f"{answer.path}: {classes}"))
    if arguments.json:
        print(json.dumps(content, indent=2))
    if unread and len(files) == 1:
        raise unread[0]
    if unread:
        raise UserError(f"{len(unread)} of {len(files)} images could not be read, as said above; accepted: pictures")


if __name__ == "__main__":
    sys.exit(main())
