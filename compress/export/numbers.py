"""Tensors of numbers in one stream for each type, each tensor in the narrowest type that keeps every bit of it."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# The types in which a tensor of another may be kept, narrowest first: what does not fit does not come back from them.
KEPT_IN: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.bool: (torch.uint8,),
    torch.bfloat16: (torch.float16, torch.float32),
    torch.float32: (torch.float16, torch.float32),
    torch.float64: (torch.float16, torch.float32, torch.float64),
    torch.uint8: INTEGERS[:1],
    torch.int8: INTEGERS[:2],
    torch.int16: INTEGERS[:3],
    torch.int32: INTEGERS[:4],
    torch.int64: INTEGERS,
}


class NumberWriter:
    """Collects tensors."""

    def __init__(self) -> None:
        self._parts: dict[torch.dtype, list[Tensor]] = {}

    def add(self, value: Tensor) -> str:
        """Puts `value` behind what was added before; returns the name of the type that it is kept in."""
        value = value.detach().cpu().reshape(-1)
        kept_in = next(dtype for dtype in KEPT_IN.get(value.dtype, (value.dtype,)) if _survives(value, dtype))
        self._parts.setdefault(kept_in, []).append(value.to(kept_in))
        return _name(kept_in)

    def streams(self) -> dict[str, Tensor]:
        """By the name of a type, all numbers that are kept in it."""
        return {_name(dtype): torch.cat(parts) for dtype, parts in self._parts.items()}


class NumberReader:
    """Takes from streams what `NumberWriter` added, in the same order. Raises ValueError where they hold less or more.

    streams: by the name of a type.
    """

    def __init__(self, streams: Mapping[str, Tensor]) -> None:
        self._rest = dict(streams)

    def take(self, shape: Sequence[int], dtype: torch.dtype, kept_in: str) -> Tensor:
        """The next numbers of the stream `kept_in`, in that shape and type."""
        if kept_in not in map(_name, KEPT_IN.get(dtype, (dtype,))):
            raise ValueError(f"{dtype} in {kept_in}")
        count, rest = math.prod(shape), self._rest.get(kept_in, torch.empty(0))
        if rest.dim() != 1 or len(rest) < count or (count and _name(rest.dtype) != kept_in):
            raise ValueError(f"a stream of {kept_in} that ends before its network")
        self._rest[kept_in] = rest[count:]
        return rest[:count].to(dtype).reshape(tuple(shape))

    def finish(self) -> None:
        """Raises ValueError where anything is left."""
        for name, rest in self._rest.items():
            if rest.numel():
                raise ValueError(f"a stream of {name} with {rest.numel()} numbers too many")


def _survives(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether every bit of `value` (n,) comes back from `dtype`."""
    return torch.equal(value.to(dtype).to(value.dtype).view(torch.uint8), value.view(torch.uint8))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
