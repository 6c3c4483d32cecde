"""Features of a network by the names of its modules, which stay as they are: hooks last for one forward pass."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from compress.errors import UserError
from compress.models.counting import run_once


@contextmanager
def tapped(network: nn.Module, names: Sequence[str], inputs: bool = False) -> Iterator[dict[str, Tensor]]:
    """Within it every call of `network` puts the outputs (or first inputs) of the modules `names` into the dict."""
    taken: dict[str, Tensor] = {}

    def take(name: str, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        taken[name] = arguments[0] if inputs else output

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(network.get_submodule(name).register_forward_hook(partial(take, name)))
        yield taken


def shapes(network: nn.Module, names: Sequence[str], input_shape: Sequence[int], inputs: bool = False) -> list[Any]:
    """The shape of the output (or input) of the modules `names` for one image, None where that is no tensor.

    `input_shape` is `(C, H, W)`.
    """
    with tapped(network, names, inputs) as taken:
        run_once(network, input_shape)
    return [tuple(taken[name].shape) if isinstance(taken.get(name), Tensor) else None for name in names]


def feature_layers(network: nn.Module, input_shape: Sequence[int]) -> list[str]:
    """The last convolutional part of `network` at each size of its feature maps, largest first.

    Parts are the children of the network (or of its one child that does all the convolutions), and the children of a
    Sequential among them that changes the size between its own. For the ResNets here that makes the stages: layer1 to
    layer4, layer1 to layer3, block1 to block3. Empty where there are no feature maps.
    """
    names = [name for name, module in network.named_modules() if name and _convolves(module)]
    size = {
        name: shape[2:]
        for name, shape in zip(names, shapes(network, names, input_shape), strict=True)
        if shape is not None and len(shape) == 4
    }

    def parts(module: nn.Module, prefix: str) -> list[str]:
        names_of_parts = []
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            sizes_within = {size.get(f"{path}.{inner}") for inner, _ in child.named_children()} - {None}
            if isinstance(child, nn.Sequential) and len(sizes_within) > 1:
                names_of_parts += parts(child, f"{path}.")
            elif path in size:
                names_of_parts.append(path)
        return names_of_parts

    prefix, children = "", network
    while len(inner := [(name, child) for name, child in children.named_children() if _convolves(child)]) == 1:
        [(name, children)] = inner
        prefix = f"{prefix}{name}."
    last = {size[name]: name for name in parts(children, prefix)}
    return sorted(last.values(), key=names.index)


def check_layers_of(network: nn.Module, names: Sequence[str], where: str) -> None:
    """Raises UserError, with `where` and the names of the two upper levels, for a name that `network` lacks."""
    known = dict(network.named_modules())
    for name in names:
        if name not in known or not name:
            upper = ", ".join(module for module in known if module and module.count(".") <= 1)
            raise UserError(f"{where}: found {name!r}; accepted: {upper}")


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv2d) for part in module.modules())
