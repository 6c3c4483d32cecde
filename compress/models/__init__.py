"""Networks by name, their channels and their size."""

from compress.models.catalogue import available, build, check_options, described, label, names_class
from compress.models.channels import architecture, changed_channels, rebuild, with_channels
from compress.models.counting import count_macs, count_parameters
from compress.models.inference import frozen_for_inference, low_precision_dtype

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
    "label",
    "low_precision_dtype",
    "names_class",
    "rebuild",
    "with_channels",
]
