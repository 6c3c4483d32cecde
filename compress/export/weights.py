"""Loads weights into a network from any file that `compress.export.state_dicts` reads, or refuses what does not fit."""

import copy
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from compress.errors import UserError
from compress.export.packed import COUNTER
from compress.export.state_dicts import ACCEPTED, listed, read_state_dict
from compress.models import masks
from compress.models.channels import last_linear, with_channels
from compress.models.timm_model import TimmModel

# What wrappers put before the name of a parameter: LightningModules, DataParallel, torch.compile.
WRAPPERS = ("model", "module", "student", "network", "_orig_mod")


def load_weights(model: nn.Module, path: str | Path, where: str = "checkpoint") -> None:
    """Copies the weights in the file `path` into `model`, cast to the dtypes of the model.

    A plain state dict, or one under "state_dict", "model" or "model_state_dict"; its keys bare or behind `model.`,
    `module.`, `student.`, `network.` or `_orig_mod.`, also several of them. A file may hold several networks under
    different prefixes: the one whose keys are exactly the model's is taken. BatchNorm's `num_batches_tracked` may be
    absent. A `TimmModel` takes timm's own files, too. A pruned network is loaded as it is: `model` gets its masks, or
    fewer channels. Of a checkpoint of ours it is the best network, and of one that was trained on grids the weights
    before they are rounded.

    Raises UserError, which names the key `where` and the file, if the file is missing, unreadable, holds code, or does
    not fit; the model is then as it was.
    """
    if isinstance(model, TimmModel):
        model = model.network
    path = Path(path).expanduser()
    state = read_state_dict(path, where)
    fitting = with_channels(copy.deepcopy(model), state.channels) if state.channels else model
    expected = fitting.state_dict()
    weights = _without_prefix(state.tensors, expected)
    loaded_masks = {name: weights.pop(name) for name in [*weights] if masks.is_mask(name)}
    # The model may have other masks from a file before.
    expected = {name: value for name, value in expected.items() if not masks.is_mask(name)}
    _check_keys(weights, expected, path, where)
    _check_classes(weights, expected, last_linear(fitting), path, where)
    _check_tensors(weights, expected, path, where)
    with_channels(model, state.channels)
    model.load_state_dict(weights, strict=False)  # strict about all but the counters, which were allowed above
    masks.restore(model, loaded_masks, where)
    masks.mask_zeros(model, [name for name in state.masked if name in masks.layers(model)])


def _without_prefix(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries behind the prefix that fits best, by their bare names: all names if one does, then most shapes."""
    prefixes = {""}
    for name in weights:
        prefix = ""
        for part in name.split(".")[:-1]:
            if part not in WRAPPERS:
                break
            prefix += f"{part}."
            prefixes.add(prefix)
    views = [
        {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        for prefix in sorted(prefixes, key=lambda prefix: (len(prefix), prefix))
    ]

    def fit(view: dict[str, Tensor]) -> tuple[bool, int]:
        fitting = [name for name in view if name in expected and view[name].shape == expected[name].shape]
        return _without_counters(view) == _without_counters(expected), len(fitting)

    return max(views, key=fit)


def _check_keys(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, where: str) -> None:
    missing = [name for name in expected if name not in weights and not name.endswith(COUNTER)]
    unexpected = [name for name in weights if name not in expected]
    problems = [f"lacks {listed(missing)}"] if missing else []
    problems += [f"has the unknown {listed(unexpected)}"] if unexpected else []
    if problems:
        wanted = len(_without_counters(expected))
        raise UserError(f"{where}: {path} {' and '.join(problems)}; accepted: exactly the model's {wanted} keys")


def _check_classes(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], classifier: str | None, path: Path, where: str
) -> None:
    """Raises UserError where the number of classes is all that differs."""
    weight = f"{classifier}.weight"
    differing = {name for name in weights if weights[name].shape != expected[name].shape}
    if weight in differing and differing <= {weight, f"{classifier}.bias"}:
        (classes, *inputs), (wanted, *wanted_inputs) = weights[weight].shape, expected[weight].shape
        if inputs == wanted_inputs:
            raise UserError(f"{where}: {path} has {classes} classes, the data have {wanted}")


def _check_tensors(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, where: str) -> None:
    wrong = [name for name in weights if weights[name].shape != expected[name].shape]
    if wrong:
        shown = [f"{name} {tuple(weights[name].shape)} for {tuple(expected[name].shape)}" for name in wrong]
        raise UserError(f"{where}: found other shapes in {path}: {listed(shown)}; accepted: the model's own")
    kinds = [name for name in weights if weights[name].is_floating_point() != expected[name].is_floating_point()]
    if kinds:
        shown = [f"{name} {str(weights[name].dtype).removeprefix('torch.')}" for name in kinds]
        raise UserError(f"{where}: found {listed(shown)} in {path}; accepted: floating-point weights")
    empty = [name for name in weights if weights[name].is_meta]
    if empty:
        raise UserError(f"{where}: found {listed(empty)} without values in {path}; {ACCEPTED}")
    broken = [name for name in weights if not weights[name].isfinite().all()]
    if broken:
        raise UserError(f"{where}: found values that are no numbers in {path}: {listed(broken)}; accepted: finite ones")


def _without_counters(names: Mapping[str, Tensor]) -> set[str]:
    return {name for name in names if not name.endswith(COUNTER) and not masks.is_mask(name)}
