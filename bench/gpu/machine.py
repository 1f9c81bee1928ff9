"""Block `machine`: card, versions, and the two rates that every other figure is held against."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from bench.clock import replayed
from bench.gpu.lab import Lab

PACKAGES = ("torch", "triton", "numpy", "einops", "scikit-learn")


def measure(lab: Lab) -> dict:
    on = lab.device
    found = {"commit": os.environ.get("ENCDIFF_COMMIT", "unknown"), "python": platform.python_version()}
    found |= {"packages": {name: _version(name) for name in PACKAGES}, "cores": os.cpu_count()}
    size = 2**20 if lab.cpu else 2**28
    source = torch.randint(256, (size,), dtype=torch.uint8, device=on)
    target = torch.empty_like(source)
    rates = {"copy_bytes_per_s": 2 * size / replayed(lambda: target.copy_(source), on, calls=5)}
    n = 64 if lab.cpu else 8192
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False), ("tf32", torch.float32, True), ("float32", torch.float32, False),
    ):  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(n, n, device=on, dtype=dtype) for _ in range(2))
        calls = 2 if name == "float32" else 5
        rates[f"{name}_flop_per_s"] = 2 * n**3 / replayed(lambda a=a, b=b: a @ b, on, calls=calls, repeats=3)
    torch.backends.cuda.matmul.allow_tf32 = False
    lab.rates = rates
    if not lab.cpu:
        p = torch.cuda.get_device_properties(0)
        found |= {"gpu": p.name, "capability": [p.major, p.minor], "multiprocessors": p.multi_processor_count}
        found |= {"l2_bytes": p.L2_cache_size, "memory": p.total_memory, "cuda": torch.version.cuda}
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"]
        found["nvidia_smi"] = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True).stdout
        calls = [torch.empty(1, device=on) for _ in range(2)]
        found["launch_us"] = 1e6 * replayed(lambda: calls[0].copy_(calls[1]), on, calls=1000, repeats=3)
    return found | {"rates": rates}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def lines(found: dict) -> list[str]:
    rates = found["rates"]
    said = f"{found.get('gpu', 'CPU')}, {found['packages']}, commit {found['commit'][:12]}"
    return [
        said, f"copy {rates['copy_bytes_per_s'] / 1e12:.2f} TB/s, products TFLOP/s: " + ", ".join(
            f"{name} {rates[f'{name}_flop_per_s'] / 1e12:.0f}" for name in ("bfloat16", "tf32", "float32")
        ) + f"; a dependent launch in a graph {found.get('launch_us', 0):.2f} us",
    ]  # fmt: skip
