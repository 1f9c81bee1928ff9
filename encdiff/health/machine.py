"""Versions, processor, GPU, compilers and engines; the rates that kernels are held against."""

import importlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from encdiff import __version__
from encdiff.ops import _build, _native

SETTINGS = ("ENCDIFF_", "TRITON_", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CXX", "OMP_NUM_THREADS", "XDG_CACHE_HOME")


def describe(device: torch.device) -> dict[str, str]:
    """What is there, in the order in which it is read."""
    problem, has_cuda = _native.load()
    half = "with its CUDA half" if has_cuda else f"without its CUDA half: {_no_cuda_half()}"
    return {
        "encdiff": f"{__version__} in {Path(__file__).parents[1]}",
        "Python": f"{platform.python_version()} in {sys.prefix}",
        "PyTorch": f"{torch.__version__}, "
        + (f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"),
        "Triton": _version("triton"),
        "NumPy": _version("numpy"),
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "GPU": _gpu(device),
        "C++ compiler": _compiler(_build.find_compiler),
        "nvcc": _compiler(_build.find_nvcc),
        "native engine": problem or f"{_build.find_or_build(torch.version.cuda is not None)}, {half}",
        "settings": ", ".join(f"{n}={v}" for n, v in sorted(os.environ.items()) if n.startswith(SETTINGS)) or "none",
    }


def _version(name: str) -> str:
    """By the module: builds of Triton are packaged under several names."""
    try:
        return importlib.import_module(name).__version__
    except ImportError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpu(device: torch.device) -> str:
    if not torch.cuda.is_available():
        return "none that this PyTorch can use"
    index = device.index or 0
    found = torch.cuda.get_device_properties(index)
    others = torch.cuda.device_count() - 1
    return (
        f"{found.name} (cuda:{index}), sm_{found.major}{found.minor}, {found.multi_processor_count} multiprocessors, "
        f"{found.total_memory / 2**30:.0f} GiB, driver {_driver()}{f', and {others} more' if others else ''}"
    )


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _compiler(find) -> str:
    """Path and version, or why there is none."""
    try:
        found = find()
    except _build.BuildError as error:
        return str(error)
    if found is None:
        return "none in CUDA_HOME or on PATH, or not wanted by ENCDIFF_CUDA"
    try:
        said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{found} does not run: {error}"
    lines = [line for line in said.splitlines() if "release" in line or line[:1] not in ("", " ")]
    release = next((line for line in lines if "release" in line), lines[0] if lines else "unknown version")
    return f"{found}: {release.strip()}"


def _no_cuda_half() -> str:
    if _build.wanted_cuda() == "0":
        return "ENCDIFF_CUDA=0"
    try:
        return "no nvcc was there" if _build.find_nvcc() is None else "it was built before nvcc was there"
    except _build.BuildError as error:
        return str(error)


def rates(device: torch.device) -> dict[str, float]:
    """What a kernel can be held against."""
    found = {"copy B/s": copy_rate(device, torch.float32)}
    for dtype in (torch.bfloat16, torch.float32):
        found[f"products in {str(dtype).removeprefix('torch.')} FLOP/s"] = product_rate(device, dtype)
    return found


def copy_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes/s, past every cache."""
    source = torch.ones(2**26, device=device, dtype=dtype)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds("target.copy_(source)", target=target, source=source)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _seconds("a @ a", a=a)


def _seconds(statement: str, **names) -> float:
    """The best of many: a limit is what the device can do, not what it did between other work."""
    return min(Timer(statement, globals=names, num_threads=torch.get_num_threads()).blocked_autorange().times)
