"""Model files: `compress-packed-2` with a quantized network in few bytes, `compress-float-1` with float32 weights.

Both are safetensors files that say how to build the network, so a reader needs nothing else and runs no code from them.
A float32 file has the tensors of the state dict under their names, a packed one has what `compress.export.packing`
says; there, weight = scale * (code - zero_point).
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import models
from compress.data.memory import free_bytes
from compress.errors import UserError, first_line
from compress.export import container
from compress.export.description import NetworkDescription, check_description, check_float32
from compress.export.encodings import ENCODINGS, Encoding
from compress.export.entropy import MOST_PER_BYTE
from compress.export.exporter import Exporter
from compress.export.packing import CODES, pack_network, unpack_network
from compress.models import masks
from compress.models.canonical import canonical
from compress.models.own_class import OwnNetwork
from compress.quantization.activations import input_quantizers
from compress.quantization.quantized import QuantizedModel

PACKED, FLOAT = "compress-packed-2", "compress-float-1"
COUNTER = "num_batches_tracked"
PROBED = 3  # images that `canonical` runs the network on
# Numbers of 4 bytes that reading holds of a weight at most: itself, its tensor and its codes on their way.
HELD = {PACKED: 5, FLOAT: 3}
# The attribute of a network that has what its file said of it.
SAID = "said_by_its_file"


@dataclass(frozen=True)
class Packed(Exporter):
    """`export=packed`: packed codes, or float32 weights, that torch computes with."""

    suffix, runtime, movable, takes_network = ".safetensors", "torch", True, True
    loading = """\
import compress, torch
network, description = compress.load({file}{network})
logits = network(torch.from_numpy(images))"""

    def write(
        self,
        path: Path,
        network: nn.Module | QuantizedModel,
        description: NetworkDescription,
        calibration_batches: Iterable[Tensor] = (),
    ) -> None:
        _write(path, network, description)

    def read(self, path: Path, threads: int = 1, network: OwnNetwork | None = None) -> tuple[nn.Module, dict[str, Any]]:
        return read_model(path, network)


def write_packed(
    path: Path, quantized: QuantizedModel, description: NetworkDescription, encodings: Sequence[Encoding] = ENCODINGS
) -> int:
    """Write `quantized`; returns the size of the file in bytes. The same content gives the same bytes.

    encodings: those that each layer has the smallest of; with "dense" alone the size does not depend on the codes.
    Raises UserError for a network that is not in float32.
    """
    check_float32(path, quantized)
    content, tensors = pack_network(quantized, encodings)
    return container.write(path, PACKED, description.as_json() | content, tensors, deflated=True)


def write_float(path: Path, model: nn.Module, description: NetworkDescription) -> int:
    """Write the state dict of `model` in float32, nothing folded; returns the size of the file in bytes.

    BatchNorm's step counters are not written. `compress.export.weights.load_weights` reads the file, too.
    """
    tensors = {
        name: value.float() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
        if not name.endswith(COUNTER) and not masks.is_mask(name)
    }
    content = description.as_json()
    if masked := list(masks.masks_of(model)):
        content["masked"] = masked
    return container.write(path, FLOAT, content, tensors)


def file_bytes(network: QuantizedModel | nn.Module, description: NetworkDescription, **options: Any) -> int:
    """The size of the file that `write_packed`, or `write_float`, would write; it is written and thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        return _write(Path(folder) / "model.safetensors", network, description, **options)


def _write(path: Path, network: QuantizedModel | nn.Module, description: NetworkDescription, **options: Any) -> int:
    if isinstance(network, QuantizedModel):
        return write_packed(path, network, description, **options)
    return write_float(path, network, description, **options)


def read_model(path: str | Path, network: OwnNetwork | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """(model in eval mode, description) of a packed or a float32 file; description["format"] says which.

    The weights are bit for bit those that were evaluated. `network`, or its class, is needed for a file of one of the
    user's own class, see `compress.models.rebuild`; it stays as it is. A float32 network of another class keeps the
    description as its attribute SAID, from which a further file of it can be written. Raises UserError, naming the
    file, where it is damaged, altered, of another format, or does not fit its network.
    """
    path = Path(path)
    kind, description, tensors = container.read(path)
    if kind not in (PACKED, FLOAT):
        raise UserError(f"{path}: found the format {kind}; accepted: {PACKED}, {FLOAT}")
    try:
        check_description(description, description["architecture"]["num_classes"])
        # Fresh weights are drawn and thrown away; reading a file must not move anyone's random numbers.
        with torch.random.fork_rng(devices=[]):
            if network is None:  # whose cost is its owner's
                _check_cost(kind, description, tensors)
            model = models.rebuild(description["architecture"], network).eval()
        if kind == PACKED:
            model = canonical(model, description["input_shape"])
            tensors, description = unpack_network(model, description, tensors)
        _load(model, tensors)
        for quantizer in input_quantizers(model).values():
            quantizer.check()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    # The checksum holds for whatever wrote the file; a foreign writer can still have put anything into it.
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        described = "a description" if network is None else "a network, the given one,"
        raise UserError(
            f"{path}: found {described} that its tensors do not fit ({first_line(error)}); accepted: those that "
            "belong together"
        ) from error
    if kind == FLOAT and network is None:
        setattr(model, SAID, description)
    return model.eval(), {"format": kind, **description}


def architecture_of(path: str | Path) -> dict[str, Any]:
    """What a packed or a float32 file says of how to build its network; empty where it says nothing."""
    try:
        _, description, _ = container.read(Path(path))
    except container.NoDescriptionError:
        return {}
    found = description.get("architecture")
    return found if isinstance(found, dict) else {}


def read_float_description(path: Path) -> dict[str, Any] | None:
    """What a float32 file says of its network; None for a file of any other kind, a packed one or a state dict, say.

    Raises UserError, naming the file, where it is a damaged or altered `.safetensors`, or describes no network.
    """
    if path.suffix != Packed.suffix:
        return None
    try:
        kind, description, _ = container.read(path)
    except container.NoDescriptionError:
        return None
    if kind != FLOAT:
        return None
    try:
        check_description(description, description["architecture"]["num_classes"])
    except (KeyError, TypeError):
        raise UserError(f"{path}: found a description without an architecture; accepted: a model file") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return description


def _check_cost(kind: str, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError where the network that is described is more than the tensors of its file could fill.

    It is built without memory for that. A weight takes a bit at least, and in the codes of a packed file a share of a
    byte; it, what is held while it is read, and what its images become have to fit into the memory, for reading a
    packed file runs its network once.
    """
    with torch.device("meta"), torch.no_grad():
        empty = models.rebuild(description["architecture"]).eval()
        weights = models.count_parameters(empty)
        stored = {value.data_ptr(): value.numel() * value.element_size() for value in tensors.values()}
        codes = tensors[CODES].numel() if kind == PACKED else 0
        most = 8 * (sum(stored.values()) - codes) + MOST_PER_BYTE * codes
        if weights > most:
            raise UserError(f"found a network of {weights:,} weights; accepted: at most {most:,}, as its tensors hold")
        values = 0

        def count(module: nn.Module, images: Any, output: Any) -> None:
            nonlocal values
            values += output.numel() if isinstance(output, Tensor) else 0

        for module in empty.modules():
            module.register_forward_hook(count)
        with suppress(RuntimeError, NotImplementedError):  # of a forward that needs values, which meta tensors lack
            empty(torch.empty(1, *description["input_shape"]))
    needed, free = 4 * (PROBED * values + HELD[kind] * weights), free_bytes(torch.device("cpu")) // 2
    if needed > free:
        raise UserError(
            f"input_shape: found {description['input_shape']}, for which the network of {weights:,} weights takes "
            f"{needed / 1e6:,.0f} MB; accepted: one that takes at most {free / 1e6:,.0f}, half of the free memory"
        )


def _load(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    expected = model.state_dict()
    missing = [name for name in expected if name not in tensors and not name.endswith(COUNTER)]
    unknown = [name for name in tensors if name not in expected]
    if missing or unknown:
        problem = f"lacks {missing[0]}" if missing else f"has the unknown {unknown[0]}"
        raise UserError(f"found a state that {problem}; accepted: exactly the tensors of its network")
    for name, value in tensors.items():
        wanted = expected[name]
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            raise UserError(
                f"{name}: found {value.dtype} {tuple(value.shape)}; accepted: {wanted.dtype} {tuple(wanted.shape)}"
            )
    learned = {name for name, _ in model.named_parameters()}
    for name, value in tensors.items():
        # A buffer may be a mask, whose infinities mean something.
        if value.is_floating_point() and not (value.isfinite() if name in learned else ~value.isnan()).all():
            raise UserError(f"{name}: found values that are no numbers; accepted: finite weights")
    model.load_state_dict(tensors, strict=False)  # strict about all but the counters, by the check above
