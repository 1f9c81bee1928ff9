"""What every benchmark needs: the device, its measured limits, and one record of what was timed."""

import pytest
import torch
from torch.utils.benchmark import Timer


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info.update(torch=torch.__version__, threads=torch.get_num_threads(), gpu=gpu)


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


@pytest.fixture
def measure(benchmark, device, limits):
    """`measure(run, dtype=..., bytes=..., flops=..., **labels)` times `run()` and fills in `extra_info`.

    `bytes` is the least that any form of the op must move, `flops` the multiply-adds of the plain form times two; the
    bound is whichever of the two takes longer at the device's measured limits.
    """

    def measure(run, *, dtype: torch.dtype, bytes: int, flops: int, **labels: str) -> None:
        benchmark.group = ", ".join(value for name, value in labels.items() if name != "impl")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        benchmark(lambda: (run(), torch.cuda.synchronize()) if device.type == "cuda" else run())
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        benchmark.extra_info.update(
            labels, dtype=str(dtype), device=str(device), bytes=bytes, flops=flops, peak_memory=peak
        )
        if benchmark.stats is not None:  # None under --benchmark-disable
            median, (bandwidth, rate) = benchmark.stats.stats.median, limits(dtype)
            benchmark.extra_info.update(
                gbps=bytes / median / 1e9,
                tflops=flops / median / 1e12,
                percent_of_bound=100 * max(bytes / bandwidth, flops / rate) / median,
            )

    return measure
