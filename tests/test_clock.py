"""bench.clock without a GPU: torch.cuda stands in for one, its clock moved by the calls."""

import itertools
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from bench import clock

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Device:
    """A GPU whose clock every kernel moves by its duration: at once, or when the graph that has it is replayed."""

    def __init__(self):
        self.now, self.ran, self.captured = 0.0, [], None
        self.mode, self.stream, self.repaired = "default", "main", 0

    def launch(self, name: str, seconds: float, waits: bool = False) -> None:
        if waits and (self.mode == "error" or self.captured is not None):
            raise RuntimeError("called a synchronizing CUDA operation\nand more")
        if self.captured is not None:
            self.captured.append((name, seconds))
        else:
            self.run(name, seconds)

    def run(self, name: str, seconds: float) -> None:
        self.ran.append(name)
        self.now += seconds

    @contextmanager
    def graph(self, graph, stream=None):
        self.captured, self.stream, self.captured_on = graph.kernels, "capture", stream
        try:
            yield
            self.stream = "main"  # as PyTorch has it: not after a failure
        finally:
            self.captured = None


class Graph:
    def __init__(self, device: Device):
        self.device, self.kernels = device, []

    def replay(self) -> None:
        for kernel in self.kernels:
            self.device.run(*kernel)

    def reset(self) -> None:
        self.kernels.clear()


class Event:
    def __init__(self, device: Device):
        self.device = device

    def record(self) -> None:
        self.at = self.device.now

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.at - self.at)


class Generator:
    def __init__(self, device: Device):
        self.device = device

    def clone_state(self) -> str:
        return "a state of its own"

    def graphsafe_set_state(self, state: str) -> None:
        self.device.repaired += state == "a state of its own"


@pytest.fixture
def gpu(monkeypatch) -> Device:
    device = Device()
    stream = SimpleNamespace(wait_stream=lambda _: None, device_index=0, cuda_stream=0)

    @contextmanager
    def on(_):
        yield

    stands_in = {
        "graph": device.graph,
        "stream": on,
        "synchronize": lambda *_: None,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "set_stream": lambda _: setattr(device, "stream", "main"),
        "CUDAGraph": lambda: Graph(device),
        "Event": lambda enable_timing: Event(device),
        "default_generators": (Generator(device),),
        "set_sync_debug_mode": lambda mode: setattr(device, "mode", mode),
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=50 * 2**20),
    }
    for name, value in stands_in.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return device


# ---- a captured graph


def test_calls_in_a_graph_take_turns_and_are_divided(gpu):
    runs = [lambda n=n: gpu.launch(f"kernel {n}", 1e-6 * (n + 1)) for n in range(3)]
    found = clock.on_device(runs, CUDA, calls=4)
    assert found == {"seconds": pytest.approx(2e-6), "timed": "graph", "calls": 6, "inputs": 3}
    replays = gpu.ran[-6:]
    assert sorted(replays) == sorted(2 * [f"kernel {n}" for n in range(3)]) and replays[:3] == replays[3:]
    assert gpu.mode == "default" and gpu.stream == "main"


def test_a_run_that_waits_for_the_device_is_timed_by_events(gpu):
    found = clock.on_device(lambda: gpu.launch("kernel", 0.5, waits=True), CUDA, calls=4)
    assert found["seconds"] == pytest.approx(0.5) and (found["timed"], found["calls"]) == ("events", 4)
    assert found["not_captured"] == "RuntimeError: called a synchronizing CUDA operation"
    assert gpu.mode == "default" and gpu.repaired == 0  # nothing was captured


def test_a_capture_is_made_on_the_stream_that_is_current(gpu):
    """But on one of its own where that is the default one, number 0."""
    torch.cuda.current_stream().cuda_stream = 7
    clock.captured(lambda: None)
    assert gpu.captured_on is torch.cuda.current_stream()
    torch.cuda.current_stream().cuda_stream = 0
    own = SimpleNamespace(wait_stream=lambda _: None)
    torch.cuda.Stream = lambda: own
    clock.captured(lambda: None)
    assert gpu.captured_on is own


def test_after_a_capture_that_failed_stream_and_generator_are_as_before(gpu):
    def run():
        if gpu.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        gpu.launch("kernel", 0.5)

    found = clock.on_device(run, CUDA, calls=4)
    assert found["seconds"] == pytest.approx(0.5) and found["timed"] == "events"
    assert "not permitted" in found["not_captured"]
    assert gpu.stream == "main" and gpu.repaired == 1


def test_what_is_known_not_to_be_captured_is_not_tried(gpu, monkeypatch):
    monkeypatch.setattr(clock, "captured", lambda *_: pytest.fail("captured"))
    found = clock.on_device(lambda: gpu.launch("kernel", 0.25), CUDA, calls=3, why_not="it is a CUDA graph itself")
    assert found == {
        "seconds": pytest.approx(0.25),
        "timed": "events",
        "calls": 3,
        "inputs": 1,
        "not_captured": "it is a CUDA graph itself",
    }


@pytest.mark.parametrize("megabytes, inputs", [(1, 16), (10, 10), (100, 2), (1000, 2)])
def test_inputs_that_take_turns_are_twice_the_cache(gpu, megabytes, inputs):
    assert clock.turns(megabytes * 2**20, CUDA) == inputs
    assert clock.turns(megabytes * 2**20, CPU) == 1


# ---- the host


def test_the_host_does_not_wait_between_calls(monkeypatch):
    now, waited = itertools.count(), []
    monkeypatch.setattr(clock, "synchronize", lambda device: waited.append(device))
    monkeypatch.setattr(clock, "called", lambda *_, **__: 0.005)
    calls = []
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(len(calls)))  # a call takes a second
    assert clock.host_seconds(lambda: calls.append(next(now)), CUDA, most=0.02, repeats=3) == 1.0
    assert len(calls) == 3 * 4 and len(waited) == 3 + 1


# ---- until times settle


def settle(*series, most: float = 1e9, least: float = 0.0) -> list[clock.WarmUp]:
    """`warm_up` of runs whose calls take these times."""
    now = [0.0]

    def run(times):
        now[0] += next(times)

    runs = [partial(run, iter(times)) for times in series]
    return clock.warm_up(runs, most, least, now=lambda: now[0])


def test_times_that_are_even_have_settled_after_two_windows():
    assert settle(itertools.repeat(0.1)) == [(16, True)]
    assert settle(itertools.cycle([0.1, 0.104])) == [(16, True)]


def test_a_slow_beginning_is_waited_for():
    """Ten steps that take ten times as long, as on a fresh machine: they no longer make a window's median."""
    [(calls, settled)] = settle([1.0] * 10 + [0.1] * 100)
    assert settled and calls - 8 >= 10 + 4
    falling = (0.1 * (1 + 10 * 0.7**n) for n in itertools.count())
    [(calls, settled)] = settle(falling)
    assert settled and 10 * 0.7 ** (calls - 4) < 0.1


def test_one_slow_call_does_not_matter():
    assert settle([0.1] * 5 + [3.0] + [0.1] * 100) == [(16, True)]


def test_those_that_have_settled_go_on_until_all_have():
    slow, fast = iter([1.0] * 20 + [0.1] * 100), iter([0.1] * 100)
    first, second = settle(slow, fast)
    assert first == (16, True) and second == (16, True)  # evenly slow for longer than two windows: not to be told
    late, early = iter([1.0 / (1 + n) for n in range(30)] + [0.01] * 100), iter([0.1] * 100)
    first, second = settle(late, early)
    assert second == (16, True) and first.settled and first.calls > 30
    assert len(list(early)) == 100 - first.calls


def test_short_calls_are_made_for_a_while():
    calls = iter([0.001] * 5000)
    assert settle(calls, least=1.0) == [(16, True)]
    assert len(list(calls)) == pytest.approx(4000, abs=1)


def test_times_that_never_settle_end_with_their_seconds():
    growing = (0.1 * 1.1**n for n in itertools.count())
    [(calls, settled)] = settle(growing, most=30.0)
    assert not settled and 30 < calls < 40


def test_calls_slower_than_the_limit_end_too():
    assert settle(itertools.repeat(7.0), most=30.0) == [(5, False)]
