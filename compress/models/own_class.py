"""A network of the user's own class, which is no file of the catalogue: the class is named, or the network is given.

The name of a class is code. It comes from the command line, from a YAML file or from Python, and never from a model
file: `compress.models.rebuild` builds no network by it.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator
from torch import nn

from compress.arguments import annotations, check_arguments, imported
from compress.errors import UserError, first_line
from compress.models.baking import copied
from compress.models.memory_format import take_contiguous_images
from compress.models.outputs import returning_logits

# A network of the user's, or the class or function that makes one.
OwnNetwork = nn.Module | Callable[..., nn.Module]
# The option of `student` and `teacher`, conf/model/module.yaml.
STEM = "module"
# The argument that a class need not have, and gets if it does.
CLASSES = "num_classes"


def _name(name: str) -> str:
    module, _, last = name.rpartition(".")
    if not module or not last:
        raise ValueError("MODULE.CLASS, such as mynet.MyNet for the class MyNet in mynet.py")
    return name


ClassName = Annotated[str, AfterValidator(_name)]


def typed(name: str) -> OwnNetwork:
    """The class or function that `network=name` on a command line names. Raises UserError where that is none."""
    check_arguments({"network": ClassName}, {"network": name}, "")
    network: OwnNetwork = imported(name, "network")
    return network


def own_network(
    num_classes: int, target: ClassName, arguments: dict[str, Any] | None = None, from_python: bool = False
) -> nn.Module:
    """The network that the class or function called `target` makes, for images `(B, 3, H, W)`.

    `target` is called with `arguments` and, if it takes them, with `num_classes`. Raises UserError for a class that
    cannot be imported or that fails, and for `from_python`: such a network has to be given again.
    """
    if from_python:
        raise UserError(
            f"found a network of the class {target!r} that was given from Python; accepted: it once more, as in "
            "compress.run([...], student=NETWORK)"
        )
    return make(imported(target, "target"), num_classes, arguments or {})


def make(target: Callable[..., nn.Module], num_classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    """The network that `target`, a class or function of the user's choice, makes."""
    name = getattr(target, "__qualname__", str(target))
    try:
        given = {CLASSES: num_classes} if CLASSES in annotations(target) else {}
        network = target(**given, **arguments)
    except UserError:
        raise
    except Exception as failure:  # a constructor of the user's can fail with anything
        raise UserError(f"{name}({_shown(arguments)}): {first_line(failure)}; accepted: what it can make") from failure
    if not isinstance(network, nn.Module):
        raise UserError(f"{name}: found what makes a {type(network).__name__}; accepted: a torch.nn.Module")
    return network


def given(network: nn.Module) -> nn.Module:
    """A copy, on the CPU and in float32, of a `network` that was given from Python."""
    return copied(network).cpu().float()


def adapted(network: nn.Module, num_classes: int) -> nn.Module:
    """`network` itself, which returns its logits alone; of a foreign class it gets images as its author had them."""
    if not type(network).__module__.startswith("compress."):
        take_contiguous_images(network)
    return returning_logits(network, num_classes)


def check(options: Mapping[str, Any], where: str) -> None:
    """Raises UserError, naming the key below `where`, for `options` of `own_network` that cannot be used."""
    if options["from_python"]:
        return
    target = imported(options["target"], f"{where}.target")
    accepted = [name for name in annotations(target) if name != CLASSES]
    check_arguments(target, options["arguments"] or {}, f"{where}.arguments", accepted=accepted)


def refuse_targets(options: Any) -> None:
    """Raises UserError for a `_target_` anywhere in `options` that come from a file: it would name code to import."""
    values = options.values() if isinstance(options, Mapping) else options if isinstance(options, list) else ()
    if isinstance(options, Mapping) and "_target_" in options:
        raise UserError(f"found the class {str(options['_target_'])!r}; accepted: a file that names no code to run")
    for value in values:
        refuse_targets(value)


def class_name(network: nn.Module) -> str:
    """The name of the class of `network`, with its module's."""
    return f"{type(network).__module__}.{type(network).__qualname__}"


def options_of(network: nn.Module) -> dict[str, Any]:
    """The options of `own_network` that stand for a `network` which is given from Python."""
    return {"target": class_name(network), "arguments": None, "from_python": True}


def _shown(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
