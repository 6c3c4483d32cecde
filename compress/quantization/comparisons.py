"""Whether a network that is to be quantized is still the same one, before its codes are chosen.

Two differences of the logits on calibration images, |changed - float| / |float|: of the folded canonical network, and
of that with every layer's weight rounded to 16 bits. Neither costs accuracy, so one that is not small is a fault.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.models.baking import copied
from compress.models.canonical import canonical, difference, layer_of
from compress.models.folding import fold_pairs
from compress.models.inference import full_float32
from compress.models.outputs import logits
from compress.quantization.calibration import CalibrationBatches
from compress.quantization.preparation import Prepared, prepare
from compress.quantization.quantized import share_weights
from compress.quantization.scales import max_abs_grid

FOLDED_LIMIT, ROUNDED_LIMIT = 1e-3, 0.05
LEVELS = 2**16


@torch.no_grad()
@full_float32()
def compare(model: nn.Module, calibration_batches: CalibrationBatches, skip: Sequence[str] = ()) -> dict[str, float]:
    """{"folded": ..., "rounded_to_16_bits": ...} of `model`, on the first calibration images.

    Raises UserError, naming the layer, where one is above its limit, and as `quantize` does.
    """
    prepared = prepare(model, calibration_batches, skip)
    images = prepared.images[0]
    reference = copied(model).eval().to(images.dtype)
    expected = logits(reference(images.clone()))
    folded = difference(prepared.analog(images.clone()), expected)
    if folded > FOLDED_LIMIT:
        name = _folded_wrongly(model, prepared, expected)
        raise UserError(
            f"{name}: found logits {folded:.2g} off the float network's when its BatchNorm is folded; accepted: up to "
            f"{FOLDED_LIMIT:g}"
        )
    rounded = difference(_rounded(prepared, prepared.order)(images.clone()), expected)
    if rounded > ROUNDED_LIMIT:
        alone = {name: difference(_rounded(prepared, [name])(images.clone()), expected) for name in prepared.order}
        name = max(alone, key=alone.__getitem__)
        raise UserError(
            f"{name}: found logits {rounded:.2g} off the float network's when weights are rounded to 16 bits, most "
            f"from this layer ({alone[name]:.2g}); accepted: up to {ROUNDED_LIMIT:g}, or the layer in skip"
        )
    return {"folded": folded, "rounded_to_16_bits": rounded}


def _rounded(prepared: Prepared, names: Sequence[str]) -> nn.Module:
    """The folded network with the weights of the named layers on 16 bits."""
    network = copy.deepcopy(prepared.analog)
    for name in names:
        layer = layer_of(network, name)
        weight = layer.weight.flatten(1)
        grid = max_abs_grid(weight, LEVELS)
        layer.weight = nn.Parameter(grid.dequantize(grid.quantize(weight)).reshape(layer.weight.shape))
    share_weights(network, prepared.choice.tied)
    return network


def _folded_wrongly(model: nn.Module, prepared: Prepared, expected: Tensor) -> str:
    """The layer whose folding alone changes the logits most."""
    images = prepared.images[0]
    off = {}
    for pair in prepared.folded:
        network = canonical(model, images.shape[1:])
        fold_pairs(network, [pair])
        off[pair[0]] = difference(network(images.clone()), expected)
    return max(off, key=off.__getitem__) if off else type(model).__name__
