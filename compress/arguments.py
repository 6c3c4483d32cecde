"""Checks the values of a config node against the annotations of the callable that will receive them."""

import contextlib
import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast

from omegaconf import OmegaConf
from pydantic import BeforeValidator, Field, Strict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from compress.errors import UserError, first_line

# Keys of a node that are no arguments: Hydra's, and the option that chose the node.
NOT_ARGUMENTS = frozenset({"_target_", "_partial_", "_recursive_", "_convert_", "stem"})
LISTS = (list, Sequence, Iterable, Collection)
MAPPINGS = (dict, Mapping)
COMPARISONS = (
    ("gt", "greater than {}"),
    ("ge", "of at least {}"),
    ("lt", "less than {}"),
    ("le", "of at most {}"),
    ("multiple_of", "divisible by {}"),
)
UNKNOWN = inspect.Parameter.empty
_SUPPLIED = object()
T = TypeVar("T")
# The annotation of an argument that the run supplies and no YAML: `seed: Supplied[int]`.
Supplied = Annotated[T, _SUPPLIED]
# Of arguments that many constructors have.
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _number(value: Any) -> Any:
    """Text to a number: `1e-3` is text in YAML 1.1, and so is whatever an environment variable holds."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    # Not-a-number compares false with every bound, so it would pass some of them; infinity passes them by right.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _integer(value: Any) -> Any:
    """As above, and `1e4`, a float in YAML, to 10000."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return int(value)
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _same_kind(options: tuple[Any, ...], value: Any) -> Any:
    """Python's `True == 1` would let `true` through where 1 is an option."""
    assert any(type(value) is type(option) and value == option for option in options)
    return value


NUMBERS = {int: BeforeValidator(_integer), float: BeforeValidator(_number)}


def check_arguments(
    target: Callable[..., Any] | Mapping[str, Any],
    arguments: Mapping[str, Any],
    where: str,
    accepted: Collection[str] | None = None,
) -> dict[str, Any]:
    """The values of `arguments`, checked and coerced, for a call `target(**values)`.

    `target` is a class or function whose signature is read (with the parents' constructors while one takes
    `**kwargs`), or a mapping from name to annotation. `accepted` names the keys that may occur; left out, they are
    the parameters with an annotation that a YAML value can meet, so networks and callables are not among them.
    An accepted key without such an annotation is passed on as it is. A parameter whose annotation is a dataclass takes
    a mapping of that dataclass's fields, from which it is built (see `build`), or an instance, and null where that is
    the default. Parameters that `arguments` does not name are not looked at (the caller may supply them), and keys that
    are no arguments (`_target_`, `stem` and the like) are left out of the answer. `where` is the key of the node, such
    as "optimizer".

    Raises UserError for an unknown key and for the first value that does not meet its annotation.
    """
    if OmegaConf.is_config(arguments):
        arguments = plain(arguments)
    if not isinstance(arguments, Mapping):
        raise UserError(f"{where}: found {_shown(arguments)}; accepted: a mapping of keys to values")
    if isinstance(target, Mapping):
        parameters = {name: (annotation, UNKNOWN) for name, annotation in target.items()}
    else:
        parameters = _parameters(target)
    kinds = {name: dataclass_of(annotation) or _yaml_type(annotation) for name, (annotation, _) in parameters.items()}
    if accepted is None:
        accepted = [name for name, kind in kinds.items() if kind is not UNKNOWN]

    values = {}
    for name, value in arguments.items():
        if name in NOT_ARGUMENTS:
            continue
        key = f"{where}.{name}" if where else str(name)
        if name not in accepted:
            raise UserError(f"{key}: found an unknown key; accepted: {', '.join(accepted) or 'no keys'}")
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
        kind = kinds.get(name, UNKNOWN)
        # `lr: float = None` is how many libraries write an optional argument.
        unset = value is None and name in parameters and parameters[name][1] is None
        if inspect.isclass(kind) and dataclasses.is_dataclass(kind):
            values[name] = value if unset or isinstance(value, kind) else build(value, key, kind)
        else:
            values[name] = value if kind is UNKNOWN or unset else _checked(kind, value, key)
    return values


def build(node: Any, where: str, kind: type | None = None, **supplied: Any) -> Any:
    """What the `_target_` of `node` (or, where it names none, `kind`) makes of its other keys and what is `supplied`.

    The keys are checked.

    Raises UserError as `check_arguments` does, for a target that cannot be imported or makes no `kind`, and, naming the
    key below `where`, for what the constructor refuses.
    """
    if not isinstance(node, Mapping) and not OmegaConf.is_config(node):
        raise UserError(f"{where}: found {_shown(node)}; accepted: a mapping of keys to values")
    target: Any = kind
    if "_target_" in node or kind is None or inspect.isabstract(kind):
        name = node.get("_target_")
        target = imported(name, where)
        if kind is not None and not (inspect.isclass(target) and issubclass(target, kind)):
            raise UserError(f"{where}: found {name}; accepted: a class derived from {kind.__module__}.{kind.__name__}")
    values = check_arguments(target, node, where, accepted=settable(target))
    try:
        return target(**values, **supplied)
    except UserError as mistake:
        # A constructor names its parameters, which lie below this node.
        below = str(mistake).partition(":")[0].partition(".")[0] in _parameters(target)
        raise UserError(f"{where}.{mistake}" if below else str(mistake)) from None
    except (TypeError, ValueError) as mistake:
        raise UserError(f"{where}: {first_line(mistake)}") from None


def imported(name: Any, where: str) -> Any:
    """The class or function called `name`.

    Raises UserError, which names the key `where`, if it cannot be imported, and if Hydra calls no such thing: a shell,
    say.
    """
    # Late, because programs that only classify start without Hydra.
    from hydra.errors import InstantiationException
    from hydra.utils import get_object, instantiate

    try:
        instantiate({"_target_": name, "_partial_": True})
        return get_object(name)
    except InstantiationException as failure:
        problem = "which cannot be imported" if failure.__cause__ else "which no configuration calls"
        raise UserError(
            f"{where}: found {name!r}, {problem}; accepted: an option, see --help, or a class that is installed or "
            "lies in the working directory"
        ) from None


def check_fields(instance: Any) -> None:
    """Checks the fields of a frozen dataclass against their annotations, for its `__post_init__`.

    Each field then holds its value as the annotation takes it, 10 for 1e1, say.
    """
    values = {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
    for name, value in check_arguments(type(instance), values, "", accepted=list(values)).items():
        object.__setattr__(instance, name, value)


def settable(target: Callable[..., Any]) -> tuple[str, ...]:
    """The names of those parameters of `target` that a YAML node sets: all that are not annotated as `Supplied`."""
    return tuple(name for name, (annotation, _) in _parameters(target).items() if not has_mark(annotation, _SUPPLIED))


def defaults(target: Callable[..., Any]) -> dict[str, Any]:
    """The defaults of those parameters of `target` that a YAML node sets, as in `settable`."""
    return {
        name: default
        for name, (annotation, default) in _parameters(target).items()
        if default is not UNKNOWN and not has_mark(annotation, _SUPPLIED)
    }


def has_mark(annotation: Any, mark: Any) -> bool:
    """Whether `annotation` is an `Annotated[...]` that carries `mark`."""
    return any(item is mark for item in getattr(annotation, "__metadata__", ()))


def annotations(target: Callable[..., Any]) -> dict[str, Any]:
    """The annotation of every name that `target` can be called with, `inspect.Parameter.empty` where there is none.

    The parents' constructors are included while one takes `**kwargs`.
    """
    return {name: annotation for name, (annotation, _) in _parameters(target).items()}


def in_words(annotation: Any) -> str:
    """What a YAML value has to be to meet `annotation`, such as "a number greater than 0"; empty where none can."""
    if found := dataclass_of(annotation):
        return f"a mapping of {', '.join(settable(found))}"
    kind = _yaml_type(annotation)
    return "" if kind is UNKNOWN else _described(kind)


def dataclass_of(annotation: Any) -> Any:
    """The dataclass that `annotation` is, or is beside None; None where it is no such thing."""
    members = typing.get_args(annotation) if typing.get_origin(annotation) in (Union, types.UnionType) else [annotation]
    named = [member for member in members if member is not types.NoneType]
    return named[0] if len(named) == 1 and inspect.isclass(named[0]) and dataclasses.is_dataclass(named[0]) else None


def arguments_of(node: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in a configuration node, as plain values: its keys without `_target_`, `stem` and the like."""
    values = plain(node) if OmegaConf.is_config(node) else node
    return {key: value for key, value in values.items() if key not in NOT_ARGUMENTS}


def plain(node: Any, resolve: bool = True) -> dict[str, Any]:
    """OmegaConf's mapping `node` as dict, with dicts and lists in it; `resolve` replaces the interpolations."""
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=resolve))


def _checked(kind: Any, value: Any, key: str) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as failure:
        # A validator written for one parameter says in its ValueError what it accepts.
        reasons = [str(error["ctx"]["error"]) for error in failure.errors() if error["type"] == "value_error"]
        accepted = reasons[0] if reasons else _described(kind)
        raise UserError(f"{key}: found {_shown(value)}; accepted: {accepted}") from None


def _parameters(target: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of every named parameter; UNKNOWN where there is none."""
    if inspect.isclass(target):
        own = [vars(parent).get("__init__") for parent in target.__mro__]
        constructors: list[Callable[..., Any]] = [one for one in own if inspect.isfunction(one)]
    else:
        constructors = [target]
    named: dict[str, tuple[Any, Any]] = {}
    for constructor in constructors:
        parameters = list(inspect.signature(constructor).parameters.values())
        try:
            hints = typing.get_type_hints(constructor, include_extras=True)
        except (NameError, AttributeError, TypeError):
            # A library may import the types that it names for its type checker alone.
            hints = {one.name: one.annotation for one in parameters if not isinstance(one.annotation, str)}
        for one in parameters[1:] if inspect.isclass(target) else parameters:
            if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
                named.setdefault(one.name, (hints.get(one.name, UNKNOWN), one.default))
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            break
    return named


def _yaml_type(annotation: Any) -> Any:
    """What of an annotation a YAML value can meet, made strict; UNKNOWN where that is nothing."""
    if annotation is None or annotation is types.NoneType:
        return types.NoneType
    if annotation in (bool, str):
        return Annotated[annotation, Strict()]
    if annotation in NUMBERS:
        return Annotated[annotation, Strict(), NUMBERS[annotation]]
    if annotation in (Any, Path):
        return annotation
    origin, inner = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin is Literal:
        return Annotated[annotation, BeforeValidator(partial(_same_kind, inner))]
    if origin is Annotated:
        if has_mark(annotation, _SUPPLIED):
            return UNKNOWN
        base, metadata = inner[0], annotation.__metadata__
        if base in NUMBERS:  # pydantic begins at the end: text becomes a number, which is then compared
            return Annotated[(base, Strict(), *metadata, NUMBERS[base])]
        base = _yaml_type(base)
        return base if base is UNKNOWN else Annotated[(base, *metadata)]
    if origin in (Union, types.UnionType):
        members = [kind for kind in map(_yaml_type, inner) if kind is not UNKNOWN]
        if all(kind is types.NoneType for kind in members):
            return UNKNOWN
        if any(_base(kind) is float for kind in members):
            # In `int | float` 1 and 1.0 differ (one batch, all batches), so neither may become the other.
            members = [_without_conversion(kind) if _base(kind) is int else kind for kind in members]
        return Union[tuple(members)]  # noqa: UP007 - the members are known only here
    if origin not in (*LISTS, tuple, *MAPPINGS):
        return UNKNOWN
    kinds = [kind if kind is Ellipsis else _yaml_type(kind) for kind in inner]
    if UNKNOWN in kinds:
        return UNKNOWN
    container = list if origin in LISTS else dict if origin in MAPPINGS else tuple
    return container[tuple(kinds)] if kinds else container


def _base(kind: Any) -> Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def _without_conversion(kind: Any) -> Any:
    return Annotated[(_base(kind), *(item for item in kind.__metadata__ if item is not NUMBERS[int]))]


def _described(kind: Any) -> str:
    """An annotation in words, such as "a number greater than 0"."""
    names = {types.NoneType: "null", bool: "true or false", str: "text", int: "a whole number", float: "a number"}
    names |= {Any: "any value", Path: "a path", list: "a list", tuple: "a list", dict: "a mapping"}
    if kind in names:
        return names[kind]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ", ".join("null" if value is None else str(value) for value in inner)
    if origin is Annotated:
        return _constrained(inner[0], kind.__metadata__)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(member) for member in inner)
    if origin is tuple and Ellipsis not in inner:
        return f"a list of {len(inner)} elements: {', '.join(_described(member) for member in inner)}"
    if origin is dict:
        return f"a mapping, each value {_described(inner[1])}"
    return f"a list, each element {_described(inner[0])}"


def _constrained(kind: Any, metadata: Iterable[Any]) -> str:
    items = [item for entry in metadata for item in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]

    def limit(name: str) -> Any:
        return next((value for item in items if (value := getattr(item, name, None)) is not None), None)

    words = [phrase.format(limit(name)) for name, phrase in COMPARISONS if limit(name) is not None]
    if limit("ge") is not None and limit("le") is not None:
        words = [f"from {limit('ge')} to {limit('le')}"]
    shortest, longest, pattern = limit("min_length"), limit("max_length"), limit("pattern")
    unit = "characters" if kind is str else "elements"
    if 1 in (shortest, longest):
        unit = unit.removesuffix("s")
    if shortest is not None and shortest == longest:
        words.append(f"of {shortest} {unit}")
    else:
        words += [f"of at least {shortest} {unit}"] if shortest is not None else []
        words += [f"of at most {longest} {unit}"] if longest is not None else []
    if pattern is not None:
        words.append(f"matching {pattern}")
    described = _described(kind)
    if not words:
        return described
    head, comma, tail = described.partition(", ")
    if typing.get_origin(kind) in (list, tuple, dict):
        return f"{head} {' and '.join(words)}{comma}{tail}"
    if described.endswith(" or null"):
        return f"{described.removesuffix(' or null')} {' and '.join(words)} or null"
    return f"{described} {' and '.join(words)}"


def _shown(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 80 else f"{text[:77]}..."
