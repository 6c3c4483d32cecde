"""Model files: `compress-packed-1` with codes of their own number of bits, `compress-float-1` with float32 weights.

Both are safetensors files that say how to build the network, so a reader needs nothing else and runs no code from them.
In a packed file the layer `name` is `name.weight.codes` (a stream of bits, see `compress.export.bits`), `.scale` (N,)
and `.zero_point` (N,): weight = scale * (code - zero_point). Where its input is quantized too, there are one
`name.input_quantizer.scale` and `.zero_point`. All other tensors stand under their state dict's names.
Where that is smaller, the stream of a layer, which then is said to have the encoding "bitmap", is a bit for each weight
that says whether it is other than zero, filled up to a byte, and the codes of these weights alone; a file with such a
layer, or of a network that lost channels, has the number 2 for 1.
"""

import copy
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from compress import models
from compress.errors import UserError
from compress.export import container
from compress.export.bits import pack, packed_length, unpack
from compress.models.folding import bake_parametrizations, fold_pairs
from compress.models.masks import is_mask, masks_of
from compress.quantization.activations import InputQuantizer, attach_input_quantizer, input_quantizers
from compress.quantization.grid import Grid
from compress.quantization.post_training import QuantizedLayer, QuantizedModel

PACKED, FLOAT = "compress-packed-1", "compress-float-1"
# With bitmaps or fewer channels, which readers of the first version do not know.
PACKED_2, FLOAT_2 = "compress-packed-2", "compress-float-2"
# What the description says more of a layer with a bitmap, in bytes.
BITMAP_NOTE = len(',"encoding":"bitmap"')
COUNTER = "num_batches_tracked"


def write_packed(
    path: str | Path,
    quantized: QuantizedModel,
    *,
    architecture: Mapping[str, Any],
    class_names: Sequence[str],
    mean: Sequence[float],
    standard_deviation: Sequence[float],
    input_shape: Sequence[int],
    extra: Mapping[str, Any] | None = None,
    bitmaps: bool = True,
) -> int:
    """Write `quantized`; returns the size of the file in bytes. The same content gives the same bytes.

    architecture: {"stem", "options", "num_classes"}, what `compress.models.build` takes. mean and standard_deviation
    normalise images in 0..1, per channel; input_shape (C, H, W). extra: more JSON to keep.
    bitmaps: keep a layer as a bitmap where that is smaller; without, the size does not depend on the codes.
    Raises UserError for a network that is not in float32, whose values a file of float32 scales could not keep.
    """
    tensors: dict[str, Tensor] = {}
    encodings = {name: encoding(layer) if bitmaps else "dense" for name, layer in quantized.layers.items()}
    for name, layer in quantized.layers.items():
        if layer.grid.scale.dtype != torch.float32:
            raise UserError(f"{path}: found {layer.grid.scale.dtype} weights in {name}; accepted: torch.float32")
        stream = _stream(layer, encodings[name])
        small = layer.grid.levels <= 256
        tensors[f"{name}.weight.codes"] = torch.from_numpy(stream)
        tensors[f"{name}.weight.scale"] = layer.grid.scale
        tensors[f"{name}.weight.zero_point"] = layer.grid.zero_point.to(torch.uint8 if small else torch.int32)
    tensors.update(quantized.float_state)
    description = network_description(architecture, class_names, mean, standard_deviation, input_shape, extra)
    description |= grids_description(quantized)
    for each in description["layers"]:
        if encodings[each["name"]] == "bitmap":
            each["encoding"] = "bitmap"
    new = "channels" in architecture or any("encoding" in each for each in description["layers"])
    return container.write(Path(path), PACKED_2 if new else PACKED, description, tensors)


def file_bytes(network: QuantizedModel | nn.Module, **description: Any) -> int:
    """The size of the file that `write_packed`, or `write_float`, would write; it is written and thrown away."""
    write = write_packed if isinstance(network, QuantizedModel) else write_float
    with tempfile.TemporaryDirectory() as folder:
        return write(Path(folder) / "model.safetensors", network, **description)


def layer_bytes(layer: QuantizedLayer) -> int:
    """What the codes of one layer take in the file, in the smaller of the encodings."""
    return min(_encoded_bytes(layer).values())


def encoding(layer: QuantizedLayer) -> Literal["dense", "bitmap"]:
    """How the file keeps the codes of one layer: all of them, or a bitmap and those that are not zero."""
    sizes = _encoded_bytes(layer)
    return min(sizes, key=sizes.__getitem__)


def write_float(
    path: str | Path,
    model: nn.Module,
    *,
    architecture: Mapping[str, Any],
    class_names: Sequence[str],
    mean: Sequence[float],
    standard_deviation: Sequence[float],
    input_shape: Sequence[int],
    extra: Mapping[str, Any] | None = None,
) -> int:
    """Write the state dict of `model` in float32, nothing folded; returns the size in bytes. See `write_packed`.

    BatchNorm's step counters are left out. `compress.export.weights.load_weights` reads the file, too.
    """
    plain = bake_parametrizations(copy.deepcopy(model))
    tensors = {
        name: value.float() if value.is_floating_point() else value
        for name, value in plain.state_dict().items()
        if not name.endswith(COUNTER) and not is_mask(name)
    }
    description = network_description(architecture, class_names, mean, standard_deviation, input_shape, extra)
    if masked := list(masks_of(plain)):
        description["masked"] = masked
    return container.write(Path(path), FLOAT_2 if "channels" in architecture else FLOAT, description, tensors)


def read_packed(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """(model in eval mode, description) of a packed file; the weights are bit for bit those that were evaluated.

    Raises UserError, naming the file, where it is damaged, altered, of another format, or does not fit its network.
    """
    return _read(Path(path), (PACKED, PACKED_2))


def read_model(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """As `read_packed`, for a packed or a float32 file; description["format"] says which."""
    return _read(Path(path), (PACKED, PACKED_2, FLOAT, FLOAT_2))


def read_float_description(path: str | Path) -> dict[str, Any] | None:
    """What a float32 file says of its network; None for a file of any other kind, a packed one or a state dict, say.

    Raises UserError, naming the file, where it is a damaged or altered `.safetensors`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return None
    try:
        kind, description, _ = container.read(path)
    except container.NoDescriptionError:
        return None
    return description if kind in (FLOAT, FLOAT_2) else None


def network_description(
    architecture: Mapping[str, Any],
    class_names: Sequence[str],
    mean: Sequence[float],
    standard_deviation: Sequence[float],
    input_shape: Sequence[int],
    extra: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What a file says of its network; the arguments are those of `write_packed`."""
    return {
        "architecture": {
            "stem": architecture["stem"],
            "options": dict(architecture["options"]),
            "num_classes": architecture["num_classes"],
        }
        | ({"channels": dict(architecture["channels"])} if "channels" in architecture else {}),
        "class_names": [str(name) for name in class_names],
        "mean": [float(value) for value in mean],
        "standard_deviation": [float(value) for value in standard_deviation],
        "input_shape": [int(size) for size in input_shape],
        "extra": dict(extra or {}),
    }


def grids_description(quantized: QuantizedModel) -> dict[str, Any]:
    """What a file says of the grids of `quantized`, beside the tensors that lie on them."""
    return {
        "layers": [
            {"name": name, "shape": list(layer.shape), "levels": layer.grid.levels, "bits": layer.bits}
            for name, layer in quantized.layers.items()
        ],
        "inputs": [
            {"name": name, "levels": quantizer.levels} for name, quantizer in input_quantizers(quantized.model).items()
        ],
        "folded": [list(pair) for pair in quantized.folded],
        "skipped": dict(quantized.skipped),
    }


def _read(path: Path, kinds: tuple[str, ...]) -> tuple[nn.Module, dict[str, Any]]:
    kind, description, tensors = container.read(path)
    if kind not in kinds:
        raise UserError(f"{path}: found the format {kind}; accepted: {', '.join(kinds)}")
    try:
        model = _build(description["architecture"])
        if kind in (PACKED, PACKED_2):
            fold_pairs(model, [(layer, norm) for layer, norm in description["folded"]])
            for layer in description["layers"]:
                known = {key: layer[key] for key in ("name", "shape", "levels")}
                _unpack_layer(tensors, **known, encoding=layer.get("encoding", "dense"))
            _add_biases(model, tensors)
            for layer in description.get("inputs", []):
                attach_input_quantizer(model.get_submodule(layer["name"]), InputQuantizer(1.0, 0, layer["levels"]))
        _load(model, tensors)
        for quantizer in input_quantizers(model).values():
            quantizer.check()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    # The checksum holds for whatever wrote the file; a foreign writer can still have put anything into it.
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{path}: found a description that its tensors do not fit ({reason})") from error
    return model.eval(), {"format": kind, **description}


def _build(architecture: Mapping[str, Any]) -> nn.Module:
    # Fresh weights are drawn and thrown away; reading a file must not move anyone's random numbers.
    with torch.random.fork_rng(devices=[]):
        model = models.rebuild(architecture)
    return model.eval()


def _unpack_layer(tensors: dict[str, Tensor], name: str, shape: list[int], levels: int, encoding: str) -> None:
    """Replace the three tensors of a layer by its weight."""
    stream, scale, zero_point = (tensors.pop(f"{name}.weight.{part}") for part in ("codes", "scale", "zero_point"))
    if stream.dtype != torch.uint8 or scale.dtype != torch.float32 or scale.shape != (shape[0],):
        raise ValueError(f"{name}: codes are uint8 and scales {shape[0]} float32")
    grid = Grid(scale, zero_point.to(torch.int32), levels)
    zeros = grid.zero_point.reshape(-1, 1).expand(shape[0], math.prod(shape[1:])).reshape(-1).numpy()
    codes = _codes(stream.numpy(), grid.bits, zeros, encoding)
    if codes.size and int(codes.max()) >= levels:
        raise ValueError(f"{name}: code {int(codes.max())} on a grid of {levels} levels")
    tensors[f"{name}.weight"] = grid.dequantize(torch.from_numpy(codes).reshape(shape))


def _kept(layer: QuantizedLayer) -> np.ndarray:
    """Whether each weight (n,) of a layer is other than zero."""
    zero = layer.grid.zero_point.reshape(-1, *[1] * (layer.codes.dim() - 1))
    return (layer.codes != zero.to(layer.codes.device)).flatten().cpu().numpy()


def _encoded_bytes(layer: QuantizedLayer) -> dict[str, int]:
    count, width = layer.codes.numel(), layer.grid.bits
    bitmap = packed_length(count, 1) + packed_length(int(_kept(layer).sum()), width) + BITMAP_NOTE
    return {"dense": packed_length(count, width), "bitmap": bitmap}


def _stream(layer: QuantizedLayer, encoding: str) -> np.ndarray:
    codes = layer.codes.flatten().cpu().numpy()
    if encoding == "dense":
        return pack(codes, layer.grid.bits)
    kept = _kept(layer)
    return np.concatenate([pack(kept.astype(np.uint8), 1), pack(codes[kept], layer.grid.bits)])


def _codes(stream: np.ndarray, width: int, zeros: np.ndarray, encoding: str) -> np.ndarray:
    """int32 (n,): the codes in a stream, where `zeros` (n,) has the code that stands for zero in the place of each."""
    if encoding == "dense":
        return unpack(stream, width, zeros.size)
    if encoding != "bitmap":
        raise ValueError(f"the encoding {encoding}")
    head = packed_length(zeros.size, 1)
    kept = unpack(stream[:head], 1, zeros.size).astype(bool)
    codes = zeros.astype(np.int32)
    codes[kept] = unpack(stream[head:], width, int(kept.sum()))
    return codes


def _add_biases(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Bias correction gives a bias to layers that were built without one."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is None and f"{name}.bias" in tensors:
            module.bias = nn.Parameter(torch.empty(module.weight.shape[0]))


def _load(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    expected = model.state_dict()
    missing = [name for name in expected if name not in tensors and not name.endswith(COUNTER)]
    unknown = [name for name in tensors if name not in expected]
    if missing or unknown:
        problem = f"lacks {missing[0]}" if missing else f"has the unknown {unknown[0]}"
        raise UserError(f"found a state that {problem}; accepted: exactly the tensors of its network")
    for name, value in tensors.items():
        if value.shape != expected[name].shape or value.dtype != expected[name].dtype:
            found = f"{value.dtype} {tuple(value.shape)}"
            raise UserError(f"{name}: found {found}; accepted: {expected[name].dtype} {tuple(expected[name].shape)}")
    model.load_state_dict(tensors, strict=False)  # strict about all but the counters, by the check above
