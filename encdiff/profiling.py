"""Where the time goes: named ranges by module and phase, and PyTorch's profiler around a piece of work.

Nothing of this runs until it is turned on: `phase` gives back one and the same empty context, and the hooks of `ranges`
exist only inside its block.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from encdiff.files.temporaries import atomic_path, disk_errors

Range = Callable[[str], AbstractContextManager]
_OFF = nullcontext()
_range: Range | None = None  # set by ranges


def phase(name: str) -> AbstractContextManager:
    """A named part of a step, such as "backward": a range inside `ranges`, nothing outside."""
    return _OFF if _range is None else _range(f"phase {name}")


@contextmanager
def ranges(model: nn.Module, mark: Range | None = None) -> Iterator[None]:
    """Inside, each module's forward pass and each `phase` is a range, by the module's name in the model.

    mark: from a name to a context manager; by default NVTX ranges (Nsight) where there is a GPU, else those of
    PyTorch's profiler. Not for a model inside `torch.compile`; a CUDA graph has its ranges once, when it is captured.
    """
    global _range
    before, _range = _range, mark or (nvtx if torch.cuda.is_available() else record_function)
    opened: list[AbstractContextManager] = []
    handles = []
    try:
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(_opens(name, _range, opened)))
                handles.append(module.register_forward_hook(_closes(opened), always_call=True))
        yield
    finally:
        _range = before
        for handle in handles:
            handle.remove()
        while opened:
            opened.pop().__exit__(None, None, None)


def _opens(name: str, mark: Range, opened: list[AbstractContextManager]) -> Callable:
    def hook(*_) -> None:
        opened.append(mark(name))
        opened[-1].__enter__()

    return hook


def _closes(opened: list[AbstractContextManager]) -> Callable:
    def hook(*_) -> None:
        opened.pop().__exit__(None, None, None)

    return hook


@contextmanager
def nvtx(name: str) -> Iterator[None]:
    """A range in Nsight Systems and Nsight Compute."""
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


@contextmanager
def capture() -> Iterator[None]:
    """What `nsys --capture-range=cudaProfilerApi` and `ncu --profile-from-start off` record: the block alone."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        yield
        torch.cuda.synchronize()
    finally:
        torch.cuda.profiler.stop()


class Cost(NamedTuple):
    """Of one name in a trace: how often, and milliseconds in all, on the host and on the GPU (0 without one)."""

    name: str
    calls: int
    host_ms: float
    gpu_ms: float


class Trace(NamedTuple):
    """What `trace` found: ranges with what they call, operators without, each by descending time."""

    ranges: list[Cost]
    operators: list[Cost]

    def table(self, most: int = 25) -> str:
        """Two tables of text: the `most` expensive ranges, and as many operators."""
        parts = (("range, with all inside", self.ranges), ("operator, itself", self.operators))
        return "\n\n".join(_table(title, costs[:most]) for title, costs in parts)


def trace(model: nn.Module, work: Callable[[], object], calls: int = 1, path: str | Path | None = None) -> Trace:
    """Run `work` once to warm up, then `calls` times under PyTorch's profiler with the model's ranges.

    path: also write Chrome's trace there, for chrome://tracing or ui.perfetto.dev.
    """
    on_gpu = torch.cuda.is_available()
    work()
    named: set[str] = set()

    def mark(name: str) -> record_function:
        named.add(name)
        return record_function(name)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler, ranges(model, mark):
        for _ in range(calls):
            with phase("all"):
                work()
        if on_gpu:
            torch.cuda.synchronize()
    if path is not None:
        with atomic_path(path) as temporary, disk_errors(ValueError, FileNotFoundError):
            profiler.export_chrome_trace(str(temporary))
            if temporary.suffix != ".gz":
                json.loads(temporary.read_bytes())  # on a full disk it is cut short or missing, without a word
    return _costs(profiler.key_averages(), named)


def _costs(averages, named: set[str]) -> Trace:
    found: tuple[list[Cost], list[Cost]] = [], []
    for e in averages:
        if e.key in named:
            if e.cpu_time_total:  # the GPU's copy of a range has none
                found[0].append(Cost(e.key, e.count, e.cpu_time_total / 1e3, e.device_time_total / 1e3))
        else:
            found[1].append(Cost(e.key, e.count, e.self_cpu_time_total / 1e3, e.self_device_time_total / 1e3))
    return Trace(*(sorted(costs, key=lambda c: (c.gpu_ms, c.host_ms), reverse=True) for costs in found))


def _table(title: str, costs: list[Cost]) -> str:
    width = max([len(title), *(len(c.name) for c in costs)])
    rows = [f"{c.name:<{width}} {c.calls:>7} {c.host_ms:>10.3f} {c.gpu_ms:>10.3f}" for c in costs]
    return "\n".join([f"{title:<{width}} {'calls':>7} {'host ms':>10} {'GPU ms':>10}", *rows])
