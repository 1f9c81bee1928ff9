"""Gradients of weights, taken beside the backward pass and written to where the optimiser reads them.

Nothing in a backward pass waits for the gradient of a weight. On a GPU, where the kernels of a small model leave much
of the device idle, these gradients have a stream of their own, and the pass goes on meanwhile. `ops.linear` and
`ops.conv2d` look for a sink on the weights that they are given; other gradients go the usual way, through `.grad`.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from encdiff.ops._dispatch import is_transformed
from encdiff.ops._triton import autocast_dtype

PENDING, BYTES = 24, 2**29  # pieces of work whose inputs are kept, and what these may take: more would only hold memory


class Beside:
    """Where the gradients of some weights are computed, and which of them are there since `begin`.

    device: a GPU, for a stream of its own; None: the work is done where it is met.
    """

    def __init__(self, device: torch.device | None = None):
        self.stream = None if device is None else torch.cuda.Stream(device)
        self.pending: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()
        self.bytes = 0  # of what is pending
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
        kept = tuple(t for t in inputs if t is not None)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:  # what was queued before an error is waited for, too
            self.pending.append((self.stream.record_event(), kept))
            self.bytes += _bytes(kept)
        while len(self.pending) > PENDING or self.bytes > BYTES:
            main.wait_event(self.pending[0][0])  # from here on the memory of its inputs may serve again
            self.bytes -= _bytes(self.pending.popleft()[1])

    def join(self) -> None:
        """What is queued from here on waits for all that was put aside."""
        if self.stream is not None and self.pending:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
            self.pending.clear()
            self.bytes = 0


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


class Sink(NamedTuple):
    """Where one weight's gradient goes: a view of its shape; or that of several, `parts` of it."""

    beside: Beside
    gradient: Tensor
    parts: tuple[Tensor, ...] = ()

    def put(self, first: Callable[[Tensor], object], more: Callable[[Tensor], object]) -> None:
        """`first(gradient)` writes it, or `more(gradient)` adds to it where the weight was used before."""
        places = {part.data_ptr() for part in self.parts or (self.gradient,)}
        before = places & self.beside.written
        if before and before != places:  # a part was used alone before
            for part in self.parts:
                if part.data_ptr() not in before:
                    part.zero_()
        self.beside.written |= places
        (more if before else first)(self.gradient)

    def take(self, gradient: Tensor) -> None:
        """One that is at hand."""
        self.put(lambda into: into.copy_(gradient), lambda into: into.add_(gradient))

    def as_matrix(self) -> "Sink":
        """Of a weight (O, I, 1, 1) that takes part as (O, I)."""
        return self._replace(gradient=self.gradient.view(self.gradient.shape[:2]))


def put_together(sinks: Sequence[Sink], write: Callable[[list[Tensor]], object]) -> None:
    """`write(gradients)` fills those of all sinks at once; they are added where a weight was used before."""
    places = {sink.gradient.data_ptr() for sink in sinks}
    written = sinks[0].beside.written
    if not places & written:
        write([sink.gradient for sink in sinks])
        written |= places
        return
    fresh = [torch.empty_like(sink.gradient) for sink in sinks]
    write(fresh)
    for sink, gradient in zip(sinks, fresh, strict=True):
        sink.take(gradient)


def sinks_of(x: Tensor, *weights: Tensor) -> tuple[Sink, ...] | None:
    """Where the gradients of these weights go in a product with x; None: the usual way, through autograd.

    That is theirs where one has no sink or asks for no gradient, where a compiler or torch.func is to see them, or
    where autocast makes copies.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    sinks = tuple(sink for w in weights if w.requires_grad and (sink := sink_of(w)) is not None)
    if len(sinks) < len(weights) or is_transformed(x, *weights) or autocast_dtype(x) is not None:
        return None
    return sinks


def joined(x: Tensor, *weights: Tensor) -> Tensor:
    """Weights (O, I) below each other, for `ops.linear` of x: as they lie in memory, or a copy.

    As they lie where there are no gradients, or their places lie so, too: the view is of the first weight alone as far
    as autograd sees, and no gradient may go that way.
    """
    shape, stride = (sum(map(len, weights)), weights[0].shape[1]), weights[0].stride()
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed(*weights)) and adjoining(
        weights
    ):
        return weights[0].as_strided(shape, stride)
    sinks = sinks_of(x, *weights)
    if sinks is None or not (adjoining(weights) and adjoining([sink.gradient for sink in sinks])):
        return torch.cat(weights)
    gradient = sinks[0].gradient.as_strided(shape, stride)
    sink = Sink(sinks[0].beside, gradient, tuple(sink.gradient for sink in sinks))
    return give(weights[0].as_strided(shape, stride), sink)


def adjoined(*weights: Tensor) -> tuple[Tensor, ...]:
    """Copies of weights (O, I) that lie below each other in one piece of memory."""
    return torch.cat([w.detach() for w in weights]).split([len(w) for w in weights])


def adjoining(matrices: Sequence[Tensor]) -> bool:
    """Whether each begins where the one before it ends, in one piece of memory."""
    ends = [m.storage_offset() + m.numel() for m in matrices]
    one = len({(m.untyped_storage()._cdata, m.dtype, m.shape[1]) for m in matrices}) == 1
    whole = all(m.ndim == 2 and m.is_contiguous() for m in matrices)
    return one and whole and all(m.storage_offset() == end for m, end in zip(matrices[1:], ends, strict=False))


def sink_of(weight: Tensor | None) -> Sink | None:
    return getattr(weight, "_sink", None)


def give(weight: Tensor, sink: Sink | None) -> Tensor:
    """The weight, whose gradient goes there."""
    weight._sink = sink  # type: ignore[attr-defined]  # a tensor takes attributes
    return weight
