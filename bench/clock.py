"""How long a call takes: on a GPU alone, in a captured graph or between two events, and as the host sees it."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from encdiff.engine.graph import uncollected

Run = Callable[[], object]
CALLS = 20  # in one graph, at least
TURNS = range(2, 17)  # how many inputs may take turns on a GPU


class WarmUp(NamedTuple):
    calls: int  # until the times had settled, or all there were
    settled: bool


def warm_up(runs: Sequence[Run], most: float, least: float = 1.0, now=time.perf_counter) -> list[WarmUp]:
    """Call them in turns until the times of all have settled, from `least` to `most` seconds."""
    began, taken, calls = now(), [[] for _ in runs], [0 for _ in runs]
    while now() - began < most and not (all(calls) and now() - began >= least):
        for n, run in enumerate(runs):
            begin = now()
            run()
            taken[n].append(now() - begin)
            if not calls[n] and settled(taken[n]):
                calls[n] = len(taken[n])
    return [WarmUp(c or len(t), c > 0) for c, t in zip(calls, taken, strict=True)]


def settled(taken: Sequence[float], window: int = 8) -> bool:
    """Whether the medians of the last two windows differ by at most a tenth.

    They are that wide because a fresh machine can be evenly slow for ten calls.
    """
    before, last = taken[-2 * window : -window], taken[-window:]
    if len(before) < window:
        return False
    medians = statistics.median(before), statistics.median(last)
    return max(medians) <= 1.1 * min(medians)


def turns(bytes: int, device: torch.device) -> int:
    """How many inputs, of a call that moves so many bytes, are twice what the GPU's cache holds; on a CPU one."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(-(-2 * cache // bytes), TURNS[0]), TURNS[-1])


def in_turns(runs: Run | Sequence[Run]) -> Run:
    """One run of several: each call is the next one's, so that its input is no longer in the cache."""
    if callable(runs):
        return runs
    following = itertools.cycle(runs)
    return lambda: next(following)()


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


def replayed(runs: Run | Sequence[Run], device: torch.device, calls: int = CALLS, repeats: int = 7) -> float:
    """Seconds of one call on the device alone: `calls` of them in one CUDA graph, in turns; median of the repeats.

    Without a GPU as `called`.
    """
    runs = [runs] if callable(runs) else list(runs)
    if device.type != "cuda":
        return called(runs[0], device, calls=2, warm_up=1)
    run = in_turns(runs)
    graph, kept = captured(lambda: [run() for _ in range(calls)], runs)
    times = [_elapsed(graph.replay) for _ in range(repeats + 1)][1:]
    del kept
    return statistics.median(times) / calls


def captured(work: Run, warm_up: Sequence[Run] = ()) -> tuple[torch.cuda.CUDAGraph, object]:
    """A CUDA graph of `work`, and its outputs, which the graph's memory holds.

    On the current stream, or one of its own where that is the default one, of which none can be captured. What compiled
    backward passes keep of the stream that they first ran on must not be the default one either.
    """
    main = torch.cuda.current_stream()
    side = main if main.cuda_stream else torch.cuda.Stream()  # the default one is number 0
    side.wait_stream(main)
    with torch.cuda.stream(side):
        for run in warm_up:
            run()
            run()
    main.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with uncollected(), torch.cuda.graph(graph, stream=side):
            outputs = work()
    except RuntimeError:
        _after_a_failed_capture(graph, main)
        raise
    return graph, outputs


def _after_a_failed_capture(graph: torch.cuda.CUDAGraph, main: torch.cuda.Stream) -> None:
    """PyTorch 2.11 leaves the capture's stream current, and its generator counting for the graph."""
    torch.cuda.set_stream(main)
    graph.reset()
    generator = torch.cuda.default_generators[main.device_index]
    generator.graphsafe_set_state(generator.clone_state())


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Inside, a call that makes the host wait for the device raises RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def repeated(run: Run, device: torch.device, calls: int = CALLS, warm_up: int = 6) -> float:
    """Seconds of one call when calls follow each other without waiting: as in a training."""
    for _ in range(warm_up):
        run()
    if device.type != "cuda":
        return called(run, device, calls=3, warm_up=0)
    return _elapsed(lambda: [run() for _ in range(calls)]) / calls


def on_device(runs: Run | Sequence[Run], device: torch.device, calls: int, why_not: str | None = None) -> dict:
    """What a benchmark records of the GPU's clock: `seconds` of a call, and whether `timed` in a graph or by events.

    `why_not`: why the calls cannot be captured, if that is known. Otherwise it is tried, and the reason recorded.
    """
    runs = [runs] if callable(runs) else list(runs)
    if why_not is None:
        calls_of_all = -(-calls // len(runs)) * len(runs)
        try:
            with waiting_refused():  # asked first: a capture that fails in the driver leaves PyTorch in disorder
                runs[0]()
            seconds = replayed(runs, device, calls_of_all)
            return {"seconds": seconds, "timed": "graph", "calls": calls_of_all, "inputs": len(runs)}
        except RuntimeError as error:
            why_not = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    seconds = repeated(in_turns(runs), device, calls)
    return {"seconds": seconds, "timed": "events", "calls": calls, "inputs": len(runs), "not_captured": why_not}


def host_seconds(run: Run, device: torch.device, most: float = 0.02, repeats: int = 5) -> float:
    """Seconds in which the host issues one call, not waiting for the device; median of the repeats.

    As many calls in a row as take `most` seconds, at most 20: of more the queue of launches would fill up.
    """
    calls = max(1, min(20, int(most / called(run, device, calls=3, warm_up=1))))
    times = []
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - begin) / calls)
    synchronize(device)
    return statistics.median(times)


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
