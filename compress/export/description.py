"""What a model file says of its network beside the tensors: how to build it, what its input and its classes are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.errors import UserError
from compress.quantization.activations import input_quantizers
from compress.quantization.quantized import QuantizedModel


@dataclass(frozen=True)
class NetworkDescription:
    """The network of a file.

    architecture: {"stem", "options", "num_classes"} and, of a network that lost channels, "channels": what
    `compress.models.rebuild` takes. mean and standard_deviation normalise images in 0..1, one value or one per channel;
    input_shape is (C, H, W). extra: more JSON to keep in the file.
    """

    architecture: Mapping[str, Any]
    class_names: Sequence[str]
    mean: Sequence[float]
    standard_deviation: Sequence[float]
    input_shape: Sequence[int]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The description in types that JSON has."""
        return {
            "architecture": {
                key: dict(value) if isinstance(value, Mapping) else value for key, value in self.architecture.items()
            },
            "class_names": [str(name) for name in self.class_names],
            "mean": [float(value) for value in self.mean],
            "standard_deviation": [float(value) for value in self.standard_deviation],
            "input_shape": [int(size) for size in self.input_shape],
            "extra": dict(self.extra),
        }


def describe(architecture: Mapping[str, Any], data: Any, extra: Mapping[str, Any] | None = None) -> NetworkDescription:
    """The description of a network of that `architecture` for the classes and images of the data module `data`."""
    return NetworkDescription(
        architecture, data.class_names, data.mean, data.standard_deviation, data.input_shape, extra or {}
    )


def check_description(description: Mapping[str, Any], outputs: int) -> None:
    """Raises UserError for a file whose classes are not those of its `outputs`, or that cannot normalise an image."""
    names, shape = description.get("class_names"), description.get("input_shape")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) != outputs:
        found = f"{len(names)} names" if isinstance(names, list) else "none"
        raise UserError(f"class_names: found {found}; accepted: one for each of the {outputs} outputs")
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(size) is int and size > 0 for size in shape):
        raise UserError(f"input_shape: found {shape!r}; accepted: channels, height and width")
    largest = torch.finfo(torch.float32).max
    ranges = {"mean": (-largest, "finite numbers"), "standard_deviation": (0.0, "finite numbers above 0")}
    for key, (least, accepted) in ranges.items():
        values = description.get(key)
        if (
            not isinstance(values, list)
            or len(values) not in (1, shape[0])
            or not all(type(value) in (int, float) and least < value < largest for value in values)
        ):
            raise UserError(f"{key}: found {str(values)[:40]}; accepted: {accepted}, one or one for each channel")


def grids_as_json(quantized: QuantizedModel) -> dict[str, Any]:
    """What a file says of the grids of `quantized`, beside the tensors that lie on them."""
    return {
        "layers": [
            {"name": name, "shape": list(layer.codes.shape), "levels": layer.grid.levels, "bits": layer.bits}
            for name, layer in quantized.layers.items()
        ],
        "inputs": [
            {"name": name, "levels": quantizer.levels} for name, quantizer in input_quantizers(quantized.model).items()
        ],
        "folded": [list(pair) for pair in quantized.folded],
        "skipped": dict(quantized.skipped),
        "tied": dict(quantized.tied),
    }


def check_float32(path: Path, quantized: QuantizedModel) -> None:
    """Raises UserError for a network in another type than float32, whose values float32 scales could not keep."""
    for name, layer in quantized.layers.items():
        if layer.grid.scale.dtype != torch.float32:
            raise UserError(f"{path}: found {layer.grid.scale.dtype} weights in {name}; accepted: torch.float32")
