"""What every benchmark needs: the device, its measured limits, and one record of what was timed."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))  # `bench` is found however pytest was started

from bench.clock import CALLS, Run, host_seconds, in_turns, on_device, synchronize, turns, warm_up
from bench.meter import launches, peak_memory
from encdiff.engine import float32_precision
from encdiff.health.machine import copy_rate, product_rate

WARM_UP = 5  # seconds at most


def pytest_addoption(parser) -> None:
    parser.addoption("--all", action="store_true", help="every case of bench, not only those that decide")


def pytest_collection_modifyitems(config, items) -> None:
    if not config.getoption("--all"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("rest")])
        items[:] = [item for item in items if not item.get_closest_marker("rest")]


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    packages = {name: version(name) for name in ("torch", "triton", "numpy")}
    machine_info.update(packages, threads=torch.get_num_threads(), gpu=gpu, cuda=torch.version.cuda)


def pytest_benchmark_update_commit_info(config, commit_info) -> None:
    if commit := os.environ.get("ENCDIFF_COMMIT"):  # of a copy without its history
        commit_info["id"] = commit


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def limits(device):
    """`limits(dtype)` -> (bytes/s of a copy, FLOP/s of a matrix product), measured once per run."""
    measured = {}

    def of(dtype: torch.dtype) -> tuple[float, float]:
        if dtype not in measured:
            measured[dtype] = copy_rate(device, dtype), product_rate(device, dtype)
        return measured[dtype]

    return of


@pytest.fixture(autouse=True)
def alike() -> Iterator[None]:
    """Every case draws the same numbers; float32 is exact, for checks and, unless `measure` is told, for times."""
    torch.manual_seed(0)
    with float32_precision(tf32=False):
        yield


@pytest.fixture
def smoke(benchmark) -> bool:
    """Whether nothing is timed (--benchmark-disable), so that sizes may be small."""
    return benchmark.disabled


@pytest.fixture
def rotated(device, smoke) -> Callable[[Callable, int], list]:
    """`rotated(make, bytes)`: inputs that take turns in a call of so many bytes, as many as no cache holds."""
    return lambda make, bytes: [make() for _ in range(1 if smoke else turns(bytes, device))]


@pytest.fixture
def measure(benchmark, device, limits, smoke):
    """`measure(run, dtype=..., bytes=..., flops=..., **labels)` times `run()` and fills in `extra_info`.

    `run` may be several, each on inputs of its own: on a GPU they take turns. There the time is that of one of `calls`
    in a captured graph (`bench.clock.on_device`), and `eager_seconds` is what the host takes to issue one; `why_not`
    says why a run cannot be captured. On a CPU it is the median of calls, once times have settled.
    `bytes` is the least that any form of the op must move, `flops` the multiply-adds of the plain form times two; the
    bound is whichever of the two takes longer at the device's measured limits. `samples` is how many images one call
    makes or takes; `tf32`: float32 products are rounded to it while timed.
    """

    def measure(
        runs: Run | Sequence[Run], *, dtype: torch.dtype, bytes: int, flops: int, samples: int | None = None,
        calls: int = CALLS, why_not: str | None = None, tf32: bool = False, **labels: str,
    ) -> None:  # fmt: skip
        on_gpu, info, run = device.type == "cuda", benchmark.extra_info, in_turns(runs)
        benchmark.group = ", ".join(value for name, value in labels.items() if name != "impl")
        info.update(labels, dtype=str(dtype), device=str(device), bytes=bytes, flops=flops, tf32=tf32 and on_gpu)
        with float32_precision(tf32):
            if smoke or not on_gpu:
                info["warm_up"] = None if smoke else warm_up([run], WARM_UP)[0]._asdict()
                benchmark(run)
            else:
                benchmark.pedantic(lambda: (run(), synchronize(device)), rounds=10, warmup_rounds=6)
                info.update(on_device(runs, device, calls, why_not), eager_seconds=host_seconds(run, device))
            if not smoke:
                info.update(peak_memory=peak_memory(run, device), launches=launches(run, device))
        if smoke:
            return
        taken = info.setdefault("seconds", benchmark.stats.stats.median)
        bandwidth, rate = limits(dtype)
        info.update(
            gbps=bytes / taken / 1e9,
            tflops=flops / taken / 1e12,
            percent_of_bound=100 * max(bytes / bandwidth, flops / rate) / taken,
            copy_gbps=bandwidth / 1e9,
            product_tflops=rate / 1e12,
            samples_per_second=samples and samples / taken,
        )

    return measure
