"""Quantizes an existing checkpoint: `python scripts/quantize.py checkpoint=FILE quantizer=gpfq quantizer.bits=[4,2]`.

FILE is a model file or checkpoint of a run, or a plain state dict, with model=resnet18 (and data=...) beside it.
Groups: data, quantizer, export; see `python scripts/run.py --help` for their options. Results go to outputs/quantized/.
"""

import sys

from compress.errors import exit_code


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(__doc__.strip())
        return 0 if arguments else 2
    # Not at the top: PyTorch takes seconds to import, and help needs none of it.
    from compress.pipeline.standalone import quantize_checkpoint

    return exit_code(lambda: quantize_checkpoint(arguments))


if __name__ == "__main__":
    sys.exit(main())
