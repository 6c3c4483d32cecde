"""Loads weights into a network from any file that `compress.export.state_dicts` reads, or refuses what does not fit."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from torch import Tensor, nn

from compress.errors import UserError
from compress.export.packed import COUNTER
from compress.export.state_dicts import ACCEPTED, listed, read_state_dict
from compress.models import masks
from compress.models.channels import last_linear, with_channels
from compress.models.resized import Resized
from compress.progress import console

# What wrappers put before the name of a parameter: LightningModules, DataParallel, torch.compile. Among networks behind
# several prefixes these come first.
WRAPPERS = ("model", "module", "student", "network", "net", "_orig_mod")
# Buffers that thop, a counter of operations, leaves in a network.
PROFILE = ("total_ops", "total_params")


def load_weights(
    model: nn.Module,
    path: str | Path,
    where: str = "checkpoint",
    new_head: bool = False,
    way_out: str = "",
    classes: Sequence[int | str] | None = None,
    class_names: Sequence[str] = (),
) -> None:
    """Copies the weights in the file `path` into `model`, cast to the dtypes of the model.

    A plain state dict, or one below any keys; its names bare or all behind one prefix, `module.` or `net._orig_mod.`,
    say. A file may hold several networks: the one whose names are exactly the model's is taken, and a line says which
    where several are. BatchNorm's `num_batches_tracked` may be absent, and the counters of a profiler are left out. A
    `Resized` network takes the files of its library, too. A pruned network is loaded as it is: `model` gets its masks,
    or fewer channels. Of a checkpoint of ours it is the best network, and of one that was trained on grids the weights
    before they are rounded. With `new_head` the classifier keeps the weights that it has, and that of the file may be
    of other classes or absent; else `way_out` ends the message about one of other classes. `classes` says for each
    class of the model, in order, which class of the file it is, by index or by
    name, where the file names them or `class_names` does.

    Raises UserError, which names the key `where` and the file, if the file is missing, unreadable, holds code, or does
    not fit; the model is then as it was.
    """
    if isinstance(model, Resized):
        model = model.network
    path = Path(path).expanduser()
    state = read_state_dict(path, where)
    fitting = with_channels(copy.deepcopy(model), state.channels) if state.channels else model
    expected = fitting.state_dict()
    head: tuple[str, ...] = ()
    classifier = _classifier(fitting)
    if new_head:
        if classifier is None:
            raise UserError(f"{where}: found a network without a classifier for which a head is new; accepted: keep")
        head = tuple(name for name in expected if name.startswith(f"{classifier}."))
        expected = {name: value for name, value in expected.items() if name not in head}
    weights = _chosen(state.networks, expected, head, path, where)
    loaded_masks = {name: weights.pop(name) for name in [*weights] if masks.is_mask(name)}
    # The model may have other masks from a file before.
    expected = {name: value for name, value in expected.items() if not masks.is_mask(name)}
    _check_keys(weights, expected, path, where)
    if classes is not None:
        indexes = _indexes(classes, state.class_names or class_names, path, way_out)
        weights = weights | _rows(weights, expected, classifier, indexes, path, way_out)
    _check_classes(weights, expected, classifier, path, where, way_out)
    _check_tensors(weights, expected, path, where)
    with_channels(model, state.channels)
    model.load_state_dict(weights, strict=False)  # strict about all but the counters, which were allowed above
    masks.restore(model, loaded_masks, where)
    masks.mask_zeros(model, [name for name in state.masked if name in masks.layers(model)])


def _chosen(
    networks: Mapping[str, Mapping[str, Tensor]],
    expected: Mapping[str, Tensor],
    head: Sequence[str],
    path: Path,
    where: str,
) -> dict[str, Tensor]:
    """The network that fits best, under the model's names: all names if one has them, then most shapes.

    The entries of the `head` are left out.
    """

    def wanted(name: str) -> bool:
        return name in expected or not (name in head or name.endswith(PROFILE))

    views = {
        (key, prefix): {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix) and wanted(name.removeprefix(prefix))
        }
        for key, tensors in networks.items()
        for prefix in _prefixes(tensors, expected)
    }

    def fit(place: tuple[str, str]) -> tuple[bool, int]:
        view = views[place]
        fitting = [name for name in view if name in expected and view[name].shape == expected[name].shape]
        return _without_counters(view) == _without_counters(expected), len(fitting)

    best = max(views, key=fit)
    whole = [f"{key} {prefix}*".strip() for key, prefix in views if fit((key, prefix))[0]]
    if len(whole) > 1:
        _say(f"{where}: {path} holds several networks that fit ({', '.join(whole)}); took {whole[0]}")
    key, prefix = best
    profile = [name for name in networks[key] if name.startswith(prefix) and name.endswith(PROFILE)]
    profile = [name for name in profile if name[len(prefix) :] not in views[best]]
    if profile:
        _say(f"{where}: left out {len(profile)} counters of a profiler in {path}, such as {profile[0]}")
    return views[best]


def _prefixes(names: Iterable[str], expected: Mapping[str, Tensor]) -> list[str]:
    """What stands before names of the model, the empty prefix first, then those of wrappers, then the shortest."""
    prefixes = {""}
    for name in names:
        parts = name.split(".")
        prefixes |= {
            "".join(f"{part}." for part in parts[:count])
            for count in range(1, len(parts))
            if ".".join(parts[count:]) in expected
        }
    return sorted(prefixes, key=lambda prefix: (not {*prefix.split(".")[:-1]} <= {*WRAPPERS}, len(prefix), prefix))


@cache
def _say(line: str) -> None:
    """Prints `line`, once in a process: a run reads its files while it is checked and when it begins."""
    console.print(line)


def _classifier(model: nn.Module) -> str | None:
    """The layer that gives the logits: the last linear one, else the last convolution."""
    convolutions = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    return last_linear(model) or next(reversed(convolutions), None)


def _check_keys(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, where: str) -> None:
    missing = [name for name in expected if name not in weights and not name.endswith(COUNTER)]
    unexpected = [name for name in weights if name not in expected]
    problems = [f"lacks {listed(missing)}"] if missing else []
    problems += [f"has the unknown {listed(unexpected)}"] if unexpected else []
    if problems:
        wanted = len(_without_counters(expected))
        raise UserError(f"{where}: {path} {' and '.join(problems)}; accepted: exactly the model's {wanted} keys")


def _indexes(classes: Sequence[int | str], names: Sequence[str], path: Path, key: str) -> list[int]:
    """The classes of the file by index, counted from 0. `key` is that of the configuration, for errors."""
    names = [*names]
    for name in classes:
        if isinstance(name, str) and name not in names:
            accepted = f"one of {listed(names)}" if names else f"an index, for {path} names no classes"
            raise UserError(f"{key}: found {name!r}; accepted: {accepted}")
    indexes = [names.index(name) if isinstance(name, str) else name for name in classes]
    twice = next((index for index in indexes if indexes.count(index) > 1), None)
    if twice is not None:
        raise UserError(f"{key}: found class {twice} of {path} twice; accepted: each class once")
    return indexes


def _rows(
    weights: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    classifier: str | None,
    indexes: Sequence[int],
    path: Path,
    key: str,
) -> dict[str, Tensor]:
    """The classifier's entries for the classes at `indexes` alone, whose logits are then compared with each other."""
    head = {name: weights[name] for name in weights if name.startswith(f"{classifier}.")}
    if not head:
        raise UserError(f"{key}: found it for a network without a classifier; accepted: null")
    (wanted,) = {len(expected[name]) for name in head}
    (available,) = {len(tensor) for tensor in head.values()}
    if len(indexes) != wanted:
        raise UserError(f"{key}: found {len(indexes)} classes, the data have {wanted}; accepted: one for each of them")
    outside = next((index for index in indexes if not 0 <= index < available), None)
    if outside is not None:
        raise UserError(f"{key}: found {outside}; accepted: from 0 to {available - 1}, the classes of {path}")
    return {name: tensor[list(indexes)] for name, tensor in head.items()}


def _check_classes(
    weights: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    classifier: str | None,
    path: Path,
    where: str,
    way_out: str,
) -> None:
    """Raises UserError where the number of classes is all that differs."""
    weight = f"{classifier}.weight"
    differing = {name for name in weights if weights[name].shape != expected[name].shape}
    if weight in differing and differing <= {weight, f"{classifier}.bias"}:
        (classes, *inputs), (wanted, *wanted_inputs) = weights[weight].shape, expected[weight].shape
        if inputs == wanted_inputs:
            accepted = f"; accepted: a file of as many, or {way_out}" if way_out else ""
            raise UserError(f"{where}: {path} has {classes} classes, the data have {wanted}{accepted}")


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
