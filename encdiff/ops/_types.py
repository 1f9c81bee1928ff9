"""What ops ask of the types of their tensors."""

import torch
from torch import Tensor

from encdiff.errors import InputError
from encdiff.ops._triton import autocast_dtype

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(**tensors: Tensor | None) -> None:
    """Raise InputError, by name, unless each tensor that is given is of a type in FLOATING."""
    for name, t in tensors.items():
        if t is not None:
            check_dtype(name, t.dtype)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATING:
        raise InputError(f"{name} is {dtype}, must be floating point: float16, bfloat16, float32 or float64")


def mixed(x: Tensor, *others: Tensor | None) -> list[str]:
    """Why PyTorch's own products cannot serve: they take one type, and autocast leaves float64 as it is."""
    other = next((t.dtype for t in others if t is not None and t.dtype != x.dtype), x.dtype)
    if other == x.dtype or (autocast_dtype(x) is not None and torch.float64 not in (other, x.dtype)):
        return []
    return [f"{x.dtype} and {other} in one product"]
