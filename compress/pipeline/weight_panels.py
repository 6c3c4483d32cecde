"""The weights that `weights.png` draws, from the float32 network and its quantized variants."""

from collections.abc import Mapping, Sequence

from torch import nn

from compress.models.folding import fold_batch_norm
from compress.quantization import QuantizedModel
from compress.results.layer_pictures import Panel

SHOWN = 4  # layers of a variant


def weight_panels(
    student: nn.Module, input_shape: Sequence[int], variants: Mapping[str, QuantizedModel]
) -> dict[str, list[Panel]]:
    """Panels of some layers of each of the `variants`, which are named like their files and made from `student`."""
    if not variants:
        return {}
    folded = fold_batch_norm(student, input_shape)
    return {name.removeprefix("student-"): _panels(folded, variant) for name, variant in variants.items()}


def _panels(folded: nn.Module, variant: QuantizedModel) -> list[Panel]:
    """The first and the last layer, and of those between the ones with the largest errors."""
    names = list(variant.layers)
    worst = sorted(names[1:-1], key=lambda name: -(variant.layers[name].error or 0))[: SHOWN - 2]
    panels = []
    for name in names:
        if name in (names[0], names[-1], *worst):
            layer = variant.layers[name]
            weight = folded.get_parameter(f"{name}.weight").detach().flatten(1).cpu()
            floats = weight / layer.grid.scale.cpu()[:, None]
            steps = layer.codes.flatten(1).cpu().int() - layer.grid.zero_point.cpu().int()[:, None]
            panels.append(Panel(f"{name}, {layer.bits} bit", floats.numpy().ravel(), steps.numpy().ravel()))
    return panels
