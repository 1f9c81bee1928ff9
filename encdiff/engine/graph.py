"""How a step runs: call by call, compiled, or as one CUDA graph."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakMethod

import torch
from torch import Tensor

from encdiff.errors import InputError

ENGINES = ("auto", "eager", "compile", "graph")
Work = Callable[..., tuple[Tensor, ...]]


def choose(engine: str, device: torch.device) -> str:
    """The engine that `auto` means on a device; InputError for one that cannot run there.

    A GPU waits for the host in every small layer, so there `auto` is the graph; `compile` compiles inside it, which on
    an H100 made the step slower. On a CPU `auto` is eager: compiling the quickstart model takes minutes and saves a
    fifth of a step (docs/performance.md).
    """
    if engine not in ENGINES:
        raise InputError(f"engine is {engine!r}, must be one of {', '.join(ENGINES)}")
    if engine == "graph" and device.type != "cuda":
        raise InputError(f"engine is 'graph', which is a CUDA graph, but the model is on {device}")
    if engine == "auto":
        return "graph" if device.type == "cuda" else "eager"
    return engine


class Graph:
    """`work(**inputs) -> outputs`, replayed as one launch.

    Inputs are tensors of fixed shapes, outputs are overwritten by the next call. `work` must read nothing back to the
    host, and keep its state (weights, moments, averages) in tensors that it updates in place. The first `warm_up` calls
    run as they are, on a side stream: libraries choose their algorithms and allocate, and parts under `torch.compile`
    are compiled. Nothing is run twice.
    """

    def __init__(self, work: Work, warm_up: int = 3):
        self.work, self.warm_up, self.calls = work, warm_up, 0
        self.side: torch.cuda.Stream | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        if self.calls < self.warm_up:
            outputs = self._aside(inputs)
            self.calls += 1  # a call that failed warmed up nothing
            return outputs
        if self.graph is None:
            self._capture(inputs)
        assert self.graph is not None
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.outputs

    def _aside(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        device = next(iter(inputs.values())).device
        self.side = self.side or torch.cuda.Stream(device)
        main, side = torch.cuda.current_stream(device), self.side
        side.wait_stream(main)
        with torch.cuda.stream(side), _uncached():
            outputs = self.work(**inputs)
        main.wait_stream(side)
        for tensor in (*inputs.values(), *outputs):  # not to be handed out again before the other stream is done
            tensor.record_stream(side)
            tensor.record_stream(main)
        return outputs

    def _capture(self, inputs: dict[str, Tensor]) -> None:
        device = next(iter(inputs.values())).device
        graph, held = torch.cuda.CUDAGraph(), {name: tensor.clone() for name, tensor in inputs.items()}
        # thread_local: the thread that reads the next batch may pin memory meanwhile
        recording = torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local")
        with uncollected(), torch.cuda.device(device), _uncached(), recording:
            outputs = self.work(**held)
        self.inputs, self.outputs, self.graph = held, outputs, graph


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, no garbage is collected: a CUDA graph that is freed while another is captured spoils that capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def unowned(method: Work) -> Work:
    """The bound method, not keeping its object alive: for the object's own attributes.

    Without the cycle the memory of what owns a graph is free at once, not when the collector next comes by.
    """
    reference = WeakMethod(method)

    def call(**inputs: Tensor) -> tuple[Tensor, ...]:
        bound = reference()
        assert bound is not None, "its object is gone"
        return bound(**inputs)

    return call


def _uncached() -> torch.autocast:
    """Autocast as it is, but without its cache: copies of weights would die with the caller's block, not the graph.

    Compiled code is guarded by whether there is a cache: warm-up and capture run under the same.
    """
    return torch.autocast(
        "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
    )
