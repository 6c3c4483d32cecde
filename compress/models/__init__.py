"""Networks by name, their channels and their size."""

from compress.models.catalogue import available, build, check_options, described, names_class
from compress.models.channels import architecture, changed_channels, rebuild, with_channels
from compress.models.counting import count_macs, count_parameters
from compress.models.inference import frozen_for_inference, laid_out, low_precision_dtype
from compress.models.outputs import returning_logits

__all__ = [
    "architecture",
    "available",
    "build",
    "changed_channels",
    "check_options",
    "count_macs",
    "count_parameters",
    "described",
    "frozen_for_inference",
    "laid_out",
    "low_precision_dtype",
    "names_class",
    "rebuild",
    "returning_logits",
    "with_channels",
]
