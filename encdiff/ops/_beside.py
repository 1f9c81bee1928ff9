"""Gradients of weights, taken beside the backward pass and written to where the optimiser reads them.

Nothing in a backward pass waits for the gradient of a weight. On a GPU, where the kernels of a small model leave much
of the device idle, these gradients have a stream of their own, and the pass goes on meanwhile. `ops.linear` and
`ops.conv2d` look for a sink on the weights that they are given; other gradients go the usual way, through `.grad`.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

PENDING = 24  # pieces of work whose inputs are kept: more would only hold memory


class Beside:
    """Where the gradients of some weights are computed, and which of them are there since `begin`.

    device: a GPU, for a stream of its own; None: the work is done where it is met.
    """

    def __init__(self, device: torch.device | None = None):
        self.stream = None if device is None else torch.cuda.Stream(device)
        self.pending: deque[tuple[torch.cuda.Event, tuple[Tensor | None, ...]]] = deque()
        self.written: set[int] = set()  # addresses of gradients

    def begin(self) -> None:
        """A new backward pass."""
        self.join()
        self.written.clear()

    @contextmanager
    def aside(self, *inputs: Tensor | None) -> Iterator[None]:
        """Inside, work is queued on the stream, behind what has made `inputs`; they are kept until it is done."""
        if self.stream is None:
            yield
            return
        main = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            yield
        self.pending.append((self.stream.record_event(), inputs))
        if len(self.pending) > PENDING:
            main.wait_event(self.pending[0][0])  # from here on the memory of its inputs may serve again
            self.pending.popleft()

    def join(self) -> None:
        """What is queued from here on waits for all that was put aside."""
        if self.pending:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
            self.pending.clear()


class Sink(NamedTuple):
    """Where one weight's gradient goes: a view of its shape."""

    beside: Beside
    gradient: Tensor

    def put(self, first: Callable[[Tensor], object], more: Callable[[Tensor], object]) -> None:
        """`first(gradient)` writes it, or `more(gradient)` adds to it where the weight was used before."""
        if self.is_written():
            more(self.gradient)
        else:
            self.beside.written.add(self.gradient.data_ptr())
            first(self.gradient)

    def is_written(self) -> bool:
        return self.gradient.data_ptr() in self.beside.written

    def as_matrix(self) -> "Sink":
        """Of a weight (O, I, 1, 1) that takes part as (O, I)."""
        return self._replace(gradient=self.gradient.view(self.gradient.shape[:2]))


def sink_of(weight: Tensor | None) -> Sink | None:
    return getattr(weight, "_sink", None)


def give(weight: Tensor, sink: Sink | None) -> Tensor:
    """The weight, whose gradient goes there."""
    weight._sink = sink
    return weight
