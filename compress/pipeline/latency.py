"""The runtime in which `quantizer.latency` is kept: networks are written as its files, and these are timed."""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from compress.errors import UserError
from compress.evaluation import paired_latency_ms
from compress.export.description import NetworkDescription
from compress.export.exporter import Exporter
from compress.export.formats import REFERENCE
from compress.quantization import QuantizedModel
from compress.quantization.latency import Runtime

# Turns for two networks; more networks have fewer, down to the least.
TURNS, LEAST_TURNS = 120, 30


def runtime_of(exporters: Sequence[Exporter], description: NetworkDescription, images: Tensor) -> Runtime:
    """That of the first of `exporters` which computes on integers; `description` and `images` are for its files.

    Raises UserError where there is none.
    """
    exporter = next((exporter for exporter in exporters if exporter != REFERENCE), None)
    if exporter is None:
        raise UserError(
            "quantizer.latency: found it without a runtime that computes on integers; accepted: with export=onnx, "
            "openvino, executorch or litert"
        )
    return Runtime(exporter.runtime, partial(_latencies_ms, exporter, description, images))


def _latencies_ms(
    exporter: Exporter, description: NetworkDescription, images: Tensor, networks: Sequence[nn.Module | QuantizedModel]
) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        models = []
        for number, network in enumerate(networks):
            path = Path(folder) / f"{number}{exporter.suffix}"
            exporter.write(path, network, description, [images])
            models.append(exporter.read_for_latency(path))
        repeats = max(LEAST_TURNS, 2 * TURNS // len(models))
        return paired_latency_ms(models, description.input_shape, repeats=repeats)
