"""What every benchmark needs: the device, its measured limits, and one record of what was timed."""

import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch.utils.benchmark import Timer

sys.path.append(str(Path(__file__).parent.parent))  # `bench` is found however pytest was started

from bench.meter import launches, peak_memory


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


def copy_rate(device, dtype) -> float:
    source = torch.ones(2**26, device=device, dtype=dtype)  # 256 MiB of float32: past every cache
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds("target.copy_(source)", target=target, source=source)


def product_rate(device, dtype) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds("a @ a", a=a)


def seconds(statement: str, **names) -> float:
    """The best of many: a limit is what the device can do, not what it did between other work."""
    return min(Timer(statement, globals=names, num_threads=torch.get_num_threads()).blocked_autorange().times)


def gpu_seconds(run) -> float:
    """Median by the GPU's own clock, its L2 cache flushed before each call."""
    from triton.testing import do_bench

    return do_bench(run, return_mode="median") / 1000


@pytest.fixture
def measure(benchmark, device, limits):
    """`measure(run, dtype=..., bytes=..., flops=..., **labels)` times `run()` and fills in `extra_info`.

    `bytes` is the least that any form of the op must move, `flops` the multiply-adds of the plain form times two; the
    bound is whichever of the two takes longer at the device's measured limits. `samples` is how many images one call
    makes or takes. On a GPU rates and per cent come from `gpu_seconds`.
    """

    def measure(run, *, dtype: torch.dtype, bytes: int, flops: int, samples: int | None = None, **labels: str) -> None:
        on_gpu, info = device.type == "cuda", benchmark.extra_info
        benchmark.group = ", ".join(value for name, value in labels.items() if name != "impl")
        benchmark(lambda: (run(), torch.cuda.synchronize()) if on_gpu else run())
        info.update(labels, dtype=str(dtype), device=str(device), bytes=bytes, flops=flops)
        if benchmark.stats is None:  # under --benchmark-disable
            return
        taken = gpu_seconds(run) if on_gpu else benchmark.stats.stats.median
        bandwidth, rate = limits(dtype)
        info.update(
            seconds=taken,
            gbps=bytes / taken / 1e9,
            tflops=flops / taken / 1e12,
            percent_of_bound=100 * max(bytes / bandwidth, flops / rate) / taken,
            copy_gbps=bandwidth / 1e9,
            product_tflops=rate / 1e12,
            samples_per_second=samples and samples / taken,
            peak_memory=peak_memory(run, device),
            launches=launches(run, device),
        )

    return measure
