"""Work on a GPU that is recorded once and replayed: launching many small kernels takes longer than running them."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor


class Recorded:
    """The kernels that `work` launches for `inputs`, CUDA tensors, as a CUDA graph; nothing is computed yet.

    A call copies other inputs of the same shapes to where the first ones lay, and runs the kernels on them. What `work`
    decides in Python stays as it was decided. `inputs` and `outputs`, what `work` returned, are then those of the call,
    and overwritten by the next. instead_of: a record that is not called any more, whose memory this one may use. Raises
    what `work` raises, and RuntimeError where it waits for the GPU, as no record can.
    """

    def __init__(self, work: Callable[..., Any], *inputs: Tensor, instead_of: "Recorded | None" = None) -> None:
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        self.graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        stream = _stream(current.device)
        stream.wait_stream(current)
        pool = None if instead_of is None else instead_of.graph.pool()
        if instead_of is None:
            # What is cached cannot become a part of the record, nor be given back while that is made.
            torch.cuda.empty_cache()
        with torch.cuda.stream(stream), _without_collector():
            # Threads that load images may go on with what they do.
            self.graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                self.outputs = work(*self.inputs)
            except BaseException:
                with suppress(RuntimeError):
                    self.graph.capture_end()
                raise
            self.graph.capture_end()
        current.wait_stream(stream)

    def __call__(self, *inputs: Tensor) -> Any:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.outputs


class Walk:
    """`work` in place on the first of its arguments, a block of a tensor, for one block after the other.

    On a GPU it is recorded at the second block of a shape and replayed from then on. Where there is no memory for that,
    it is done as usual.
    """

    # The last of all walks: the next ones have its memory, of which nothing is needed between two calls.
    last: ClassVar[Recorded | None] = None

    def __init__(self, work: Callable[..., None]) -> None:
        self.work = work
        self.recorded: dict[tuple[torch.Size, ...], Recorded | None] = {}
        self.has_room = True

    def __call__(self, block: Tensor, *others: Tensor) -> None:
        recorded = self._recorded(block, *others) if block.is_cuda and self.has_room else None
        if recorded is None:
            self.work(block, *others)
        else:
            recorded(block, *others)
            block.copy_(recorded.inputs[0])

    def _recorded(self, *inputs: Tensor) -> Recorded | None:
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self.recorded:
            self.recorded[shapes] = None
            return None
        if self.recorded[shapes] is None:
            try:
                self.recorded[shapes] = Walk.last = Recorded(self.work, *inputs, instead_of=Walk.last)
            except torch.OutOfMemoryError:
                self.has_room = False
                torch.cuda.empty_cache()
        return self.recorded[shapes]


@contextmanager
def _without_collector() -> Iterator[None]:
    """Nothing is collected: the end of another graph, say, would be an operation that no record may hold."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one that all records are made on: memory of one is of use to another on the same stream alone."""
    return torch.cuda.Stream(device)
