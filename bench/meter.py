"""What one call costs besides its time: launches and memory, measured in passes of their own."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch", "cudaMemcpy", "cudaMemset")
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def launches(run: Callable, device: torch.device) -> int:
    """What the host issues in one call, by PyTorch's profiler.

    On a GPU kernels, copies, fills and whole graphs, as CUDA's own trace has them; on a CPU operators, nested calls
    included.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    run()
    with profile(activities=activities) as traced:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    events = traced.events()
    return sum(e.name.startswith(LAUNCHES) for e in events) if on_gpu else len(events)


def peak_memory(run: Callable, device: torch.device) -> int | None:
    """Bytes at the peak of one call.

    On a GPU all that PyTorch holds (graphs' pools too), the model and the inputs included. On a CPU the growth of the
    process's resident memory, so without them; None where the system does not tell.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_reserved(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept from before would hide what is taken now
        CLEAR_REFS.write_text("5")  # resets the peak: proc(5)
        before = resident("VmRSS")
        run()
        return max(0, resident("VmHWM") - before)
    except (AttributeError, OSError, LookupError):
        return None


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise LookupError(field)
