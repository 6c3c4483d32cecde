"""Quantizes an existing checkpoint: `python scripts/quantize.py checkpoint=FILE quantizer=gpfq quantizer.bits=[4,2]`.

FILE is a model file or checkpoint of a run, or a plain state dict, with model=resnet18 (and data=...) beside it; where
it is of a class of your own, network=mynet.MyNet names that.
Groups: data, quantizer, export; see `python scripts/run.py --help` for their options. --config-dir DIR: a folder of
options of your own. data=folder data.root=PICTURES takes pictures without labels, too: the table then has the agreement
with the float network; data.class_names=NAMES names its classes where FILE does not. Results go to outputs/quantized/.
"""

import argparse
import sys

from compress.errors import add_debug, exit_code
from compress.paths import import_from_here, searching


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(__doc__.strip())
        return 0 if arguments else 2
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-dir")
    add_debug(parser)
    options, overrides = parser.parse_known_args(arguments)
    import_from_here()

    def work() -> None:
        # Not at the top: PyTorch takes seconds to import, and help needs none of it.
        from compress.config.compose import searched_folders
        from compress.pipeline.standalone import quantize_checkpoint

        with searching(searched_folders([], options.config_dir)):
            quantize_checkpoint(overrides)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
