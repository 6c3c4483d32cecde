"""Classifies images with a model file: `python scripts/predict.py model.safetensors cat.png dog.jpg --top 3`."""

import argparse
import json
import sys
from pathlib import Path

from compress.errors import exit_code
from compress.paths import import_from_here, searching
from compress.predict import Predictor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="a model file from a run's models/")
    parser.add_argument("images", nargs="+", help="image files of any size")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="print the K likeliest classes (default 1)")
    parser.add_argument("--config-dir", type=Path, metavar="D", help="a folder of YAML files with your own network")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    arguments = parser.parse_args()
    folders = [] if arguments.config_dir is None else [arguments.config_dir]
    import_from_here()
    with searching(folders):
        return exit_code(lambda: predict(arguments))


def predict(arguments: argparse.Namespace) -> None:
    """Prints the classes of the images, as lines or as JSON."""
    predictions = Predictor.read(arguments.file)(arguments.images, arguments.top)
    ranked = [list(zip(image.classes, image.probabilities, strict=True)) for image in predictions]
    if arguments.json:
        content = [
            {"path": image.path, "classes": [{"class": name, "probability": value} for name, value in pairs]}
            for image, pairs in zip(predictions, ranked, strict=True)
        ]
        print(json.dumps(content, indent=2))
    else:
        for image, pairs in zip(predictions, ranked, strict=True):
            print(f"{image.path}: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in pairs))


if __name__ == "__main__":
    sys.exit(main())
