"""What every block is given, and how it times."""

import json
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.baselines import PAPER, SMOKE
from encdiff.engine import uncollected
from encdiff.models import EncDiffConfig

Run = Callable[[], object]


class Late(Exception):
    """A block's time is up."""


@dataclass
class Lab:
    """Where results go, what is measured, and when it must end."""

    out: Path
    caches: Path  # what a later call can use again
    cpu: bool
    end: float
    rates: dict[str, float] = field(default_factory=dict)  # bytes/s of a copy, FLOP/s of products: of block `machine`

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.cpu else "cuda")

    @property
    def config(self) -> EncDiffConfig:
        return SMOKE if self.cpu else PAPER

    @property
    def batch(self) -> int:
        return 2 if self.cpu else 128

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def save(self, name: str, result: object) -> None:
        path = self.out / f"{name}.json"
        path.with_suffix(".part").write_text(json.dumps(result, indent=1))
        path.with_suffix(".part").replace(path)

    def load(self, name: str):
        path = self.out / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises `Late` inside the block once its time is up."""

    def ring(*_):
        raise Late(f"out of time after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def called(run: Run, device: torch.device, calls: int = 10, warm_up: int = 3) -> float:
    """Seconds of one call as the host makes it, median; on a GPU until the device is done."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(calls):
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def replayed(runs: Run | Sequence[Run], device: torch.device, calls: int = 20, repeats: int = 7) -> float:
    """Seconds of one call on the device alone: `calls` of them in one CUDA graph, over rotating inputs; median.

    Several runs take turns, so that an input is not in the cache when its turn comes. Without a GPU as `called`.
    """
    runs = [runs] if callable(runs) else list(runs)
    if device.type != "cuda":
        return called(runs[0], device, calls=2, warm_up=1)
    graph, kept = captured(lambda: [runs[i % len(runs)]() for i in range(calls)], runs)
    times = [_elapsed(graph.replay) for _ in range(repeats + 1)][1:]
    del kept
    return statistics.median(times) / calls


def captured(work: Run, warm_up: Sequence[Run] = ()) -> tuple[torch.cuda.CUDAGraph, object]:
    """A CUDA graph of `work`, and its outputs, which the graph's memory holds."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in warm_up:
            run()
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with uncollected(), torch.cuda.graph(graph):
        outputs = work()
    return graph, outputs


def repeated(run: Run, device: torch.device, calls: int = 20, warm_up: int = 6) -> float:
    """Seconds of one call when calls follow each other without waiting: as in a training."""
    for _ in range(warm_up):
        run()
    if device.type != "cuda":
        return called(run, device, calls=3, warm_up=0)
    return _elapsed(lambda: [run() for _ in range(calls)]) / calls


def _elapsed(run: Run) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
