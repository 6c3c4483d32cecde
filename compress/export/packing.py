"""What a packed file holds of a quantized network, in streams and an entry for each layer, and that network again.

The network that the description builds says which layers and tensors there are, in which shapes; the file has the rest:
`codes` (see `compress.export.encodings`), and for each type a stream of the numbers that are kept in it (see
`compress.export.numbers`), first the scales of the layers, then the tensors of `float_state`, by name.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from compress.export.container import aliases_of, to_json
from compress.export.description import grids_as_json
from compress.export.encodings import ENCODINGS, CodeReader, Encoding, encoding, write_codes, zero_points
from compress.export.numbers import NumberReader, NumberWriter
from compress.models.canonical import Layer, layers
from compress.models.folding import find_foldable, fold_pairs
from compress.quantization.activations import InputQuantizer, attach_input_quantizer, input_quantizers
from compress.quantization.biases import LEVELS, rounded, short_biases
from compress.quantization.grid import Grid, code_dtype
from compress.quantization.quantized import QuantizedLayer, QuantizedModel, float_state

CODES = "codes"
# Where the description has the entry of each layer, the types that tensors are kept in, and other names for some.
LAYERS, STATE, SHARED = "layers", "state", "shared"
# The checksum of all names and shapes that are not in the file, and the words of `codes` that are a stack.
STRUCTURE, WORDS = "structure", "words"


def pack_network(
    quantized: QuantizedModel, among: Sequence[Encoding] = ENCODINGS
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what the description says, the streams) of `quantized`; each layer in the smallest of the encodings `among`.

    An entry of a layer has `bias`: whether there is one; `inputs`: levels of its input, where they are quantized; and
    of a layer with codes `levels`, `bits`, `encoding`, `scale`: the type of its scales and how many there are, one or
    one for each channel; and `zero_point`: the lowest and the highest one.
    """
    every = layers(quantized.model)
    coded = {name: quantized.layers[name] for name in every if name in quantized.layers}
    inputs = {name: quantizer.levels for name, quantizer in input_quantizers(quantized.model).items()}
    if unknown := (quantized.layers.keys() | inputs.keys()) - every.keys():
        raise ValueError(f"{min(unknown)} is no layer of the network")
    encodings = [encoding(layer, among) for layer in coded.values()]
    codes, words = write_codes(list(coded.values()), encodings)
    chosen = dict(zip(coded, encodings, strict=True))
    numbers = NumberWriter()
    entries = []
    for name, layer in every.items():
        entry: dict[str, Any] = {} if layer.bias is None else {"bias": True}
        if name in inputs:
            entry["inputs"] = inputs[name]
        if name in coded:
            entry |= {"encoding": chosen[name]} | _grid_entry(coded[name], numbers)
        entries.append(entry)
    shared = _shared(quantized)
    names = sorted(quantized.float_state.keys() - shared.keys())
    kept = quantized.float_state | short_biases(quantized)
    content = {
        LAYERS: entries,
        STATE: [numbers.add(kept[name]) for name in names],
        STRUCTURE: _structure(every, quantized.float_state, quantized.folded),
        WORDS: words,
    }
    named = {SHARED: shared, "skipped": dict(quantized.skipped), "tied": dict(quantized.tied)}
    content |= {key: value for key, value in named.items() if value}
    return content, {CODES: torch.from_numpy(codes)} | numbers.streams()


def unpack_network(
    model: GraphModule, description: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Give the canonical `model` the modules of the quantized network that `pack_network` packed.

    Returns (its state dict, what the description says in the terms of `grids_as_json`). Raises ValueError, KeyError,
    TypeError or AttributeError for content that does not belong to `model`.
    """
    folded = find_foldable(model)
    fold_pairs(model, folded)
    every, tied = layers(model), description.get("tied", {})
    entries = dict(zip(every, description[LAYERS], strict=True))
    for name, entry in entries.items():
        _prepare_layer(name, every[name], entry)
    codes = CodeReader(tensors[CODES].numpy(), description[WORDS])
    numbers = NumberReader({name: stream for name, stream in tensors.items() if name != CODES})
    coded = {
        name: _read_layer(every[name].weight.shape, entry, codes, numbers)
        for name, entry in entries.items()
        if "levels" in entry
    }
    codes.finish()
    expected = float_state(model, [*coded, *tied])
    if description[STRUCTURE] != _structure(every, expected, folded):
        raise ValueError("it describes another network")
    shared = description.get(SHARED, {})
    names = sorted(expected.keys() - shared.keys())
    state = {
        name: numbers.take(expected[name].shape, expected[name].dtype, kept_in)
        for name, kept_in in zip(names, description[STATE], strict=True)
    }
    numbers.finish()
    state |= {name: state[other] for name, other in shared.items()}
    state |= {f"{name}.weight": layer.grid.dequantize(layer.codes) for name, layer in coded.items()}
    for name in [*coded, *tied]:
        if f"{name}.bias" in state and entries[name].get("inputs") == LEVELS:
            scale = coded[tied.get(name, name)].grid.scale
            bias, input_scale = state[f"{name}.bias"], state[f"{name}.input_quantizer.scale"]
            state[f"{name}.bias"] = rounded(bias, scale, input_scale)
    state |= {f"{name}.weight": state[f"{holder}.weight"] for name, holder in tied.items()}
    skipped = description.get("skipped", {})
    grids = grids_as_json(QuantizedModel(model, coded, state, folded, skipped, tied))
    for layer in grids["layers"]:
        layer["encoding"] = entries[layer["name"]]["encoding"]
    kept = {key: value for key, value in description.items() if key not in (STATE, SHARED, STRUCTURE, WORDS)}
    return state, kept | grids


def _grid_entry(layer: QuantizedLayer, numbers: NumberWriter) -> dict[str, Any]:
    scale, (lowest, highest) = layer.grid.scale, zero_points(layer.grid)
    scale = scale[:1] if bool((scale == scale[0]).all()) else scale
    return {
        "bits": round(layer.bits, 2),  # of a network at a rate they are a mean
        "levels": layer.grid.levels,
        "scale": [numbers.add(scale), len(scale)],
        "zero_point": [lowest, highest],
    }


def _prepare_layer(name: str, layer: Layer, entry: Mapping[str, Any]) -> None:
    """Give a layer its grid of inputs, and the bias that bias correction gives one that was built without."""
    if not entry.get("bias", False) and layer.bias is not None:
        raise ValueError(f"no bias of {name}, which has one")
    if entry.get("bias", False) and layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros(layer.weight.shape[0]))
    if "inputs" in entry:
        attach_input_quantizer(layer, InputQuantizer(1.0, 0, entry["inputs"]))


def _read_layer(
    shape: torch.Size, entry: Mapping[str, Any], codes: CodeReader, numbers: NumberReader
) -> QuantizedLayer:
    rows = shape[0]
    kept_in, count = entry["scale"]
    if count not in (1, rows):
        raise ValueError(f"{count} scales of {rows} channels")
    scale = numbers.take([count], torch.float32, kept_in).expand(rows).contiguous()
    lowest, highest = entry["zero_point"]
    zero_point = torch.from_numpy(codes.zero_points(rows, lowest, highest))
    grid = Grid(scale, zero_point, entry["levels"])
    found = torch.from_numpy(codes.codes(grid, shape, entry["encoding"])).to(code_dtype(grid.levels))
    return QuantizedLayer(found, grid, entry["bits"], None)


def _shared(quantized: QuantizedModel) -> dict[str, str]:
    """For each tensor of the float state that is another one in the network, and equal to it, the name of that one."""
    state = quantized.float_state
    held = {name: value for name, value in quantized.model.state_dict().items() if name in state}
    return {name: other for name, other in aliases_of(held).items() if torch.equal(state[name], state[other])}


def _structure(every: Mapping[str, Layer], state: Mapping[str, Tensor], folded: Iterable[tuple[str, str]]) -> int:
    """CRC-32 of the names and shapes of layers and tensors, and of the folded pairs."""
    shapes = [[name, list(layer.weight.shape)] for name, layer in every.items()]
    kept = [[name, list(state[name].shape)] for name in sorted(state)]
    return zlib.crc32(to_json([shapes, kept, [list(pair) for pair in folded]]).encode())
