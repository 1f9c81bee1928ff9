"""What ops ask of a tensor before they choose: whether kernels run where it is, autocast, gradients."""

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
FUSED_TYPES = tuple(NAMES)
_INSTALLED = find_spec("triton") is not None
# asked once: torch.compile of PyTorch 2.11 cannot trace the question
_AUTOCAST = frozenset(d for d in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(d))


def unavailable(x: Tensor, name: str = "x") -> list[str]:
    """Why no kernel runs where a tensor is: on a GPU of compute capability 8.0 or more, or interpreted on the CPU."""
    reasons = not_for(x.device)
    if not x.is_cuda and (x.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1"):
        reasons.append(f"{name} is on {x.device.type}")
    return reasons


def not_for(device: torch.device) -> list[str]:
    """Why no kernel can be compiled for a device, or be interpreted on it."""
    reasons = [] if _INSTALLED else ["triton is not installed"]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        reasons.append("the GPU is older than compute capability 8.0")
    return reasons


def interpreted(x: Tensor, *_, **__) -> list[str]:
    """The doubt about a kernel that would run there for tests only."""
    return [] if x.is_cuda else ["interpreted on the CPU: slow, for tests"]


def autocast_off(x: Tensor) -> AbstractContextManager:
    """Inside, autocast casts nothing where x is; on a device that has none, such as meta, there is nothing to leave."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if device in _AUTOCAST else nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that autocast casts to where x is, None where it is off."""
    device = x.device.type
    on = device in _AUTOCAST and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def has_gradient(*tensors) -> bool:
    """Whether autograd would record an op of these."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
