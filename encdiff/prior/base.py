"""What every prior is: a distribution over a model's codes that can be sampled, saved and loaded."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from encdiff.errors import InputError
from encdiff.files.checkpoint import save_tensors

FILE = "prior.safetensors"  # its name in a folder
Progress = Callable[[int, int], None]  # (done, total)


class Prior(ABC):
    """A distribution over codes of `code_shape`, (N,) or (N, m), fitted to `fitted` of them."""

    kind: ClassVar[str]

    def __init__(self, code_shape: tuple[int, ...], fitted: int):
        self.code_shape, self.fitted = code_shape, fitted

    @property
    @abstractmethod
    def title(self) -> str:
        """In a few words, for captions."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: dict[str, Tensor], code_shape: tuple[int, ...], fitted: int, source: str) -> Self:
        """The prior of these tensors; InputError, naming `source`, for others."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that sampling needs."""

    @abstractmethod
    def _rows(self, sample_ids: Tensor, key: int) -> Tensor:
        """Codes, flat (n, N m), each a function of its id and the key."""

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """`count` codes, float32 (count, N) or (count, N, m) on the CPU, the same for the same seed.

        Code i depends on the seed and i, not on `count`, but for rounding.
        """
        check_whole(count=(count, 1, 2**31), seed=(seed, 0, 2**63))
        codes = self._rows(torch.arange(count), key_of(seed))
        return codes.float().reshape(count, *self.code_shape)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all: `path`, or `prior.safetensors` in the folder `path`."""
        file = file_of(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = ",".join(map(str, self.code_shape))
        about = {"format": "pt", "prior": self.kind, "code_shape": shape, "fitted": str(self.fitted)}
        save_tensors(file, self.tensors(), about)
        return file


def key_of(seed: int) -> int:
    """The key of a prior's own numbers: images that are drawn by the same seed use others."""
    return (seed + 0x9E3779B97F4A7C15) % 2**64


def file_of(path: str | Path) -> Path:
    """A prior's file: itself, or in a folder."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE


LARGEST = 1e30  # of a code: its square is a float64, and it is a float32 itself


def flat_codes(codes: Any) -> tuple[Tensor, tuple[int, ...]]:
    """Codes, array or tensor, as float64 (n, N m) on the CPU, and the shape of one; InputError for what is none."""
    try:
        rows = torch.as_tensor(codes).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"codes are a {type(codes).__name__}, must be numbers (n, N) or (n, N, m)") from None
    if not rows.is_floating_point() or rows.ndim not in (2, 3) or len(rows) < 2 or not rows.numel():
        found = f"{rows.dtype} {tuple(rows.shape)}"
        raise InputError(f"codes are {found}, must be floating point (n, N) or (n, N, m), n at least 2")
    if not rows.isfinite().all() or rows.abs().max() > LARGEST:
        raise InputError(f"codes hold NaN, infinite or huge numbers, must be finite and within {LARGEST:g}")
    return rows.double().flatten(1), tuple(rows.shape[1:])


def standardised(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows (n, D) at zero mean and unit deviation, that mean and deviation; what does not vary is all zeros."""
    offset, scale = rows.mean(0), rows.std(0, correction=0)
    scale = torch.where(scale > 1e-7 * offset.abs(), scale, 0)  # else it is rounding
    return (rows - offset) / torch.where(scale > 0, scale, 1), offset, scale


def check_whole(**given: tuple[Any, int, int]) -> None:
    """Raise InputError for the first argument, by name (value, least, bound), that is no integer in least..bound-1."""
    for name, (value, least, bound) in given.items():
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or not least <= value < bound:
            most = f"and below 2^{bound.bit_length() - 1}"
            raise InputError(f"{name} is {value!r}, must be a whole number, at least {least} {most}")


def read_about(about: Mapping[str, str], source: str) -> tuple[tuple[int, ...], int]:
    """code_shape and fitted of a file's metadata."""
    shape, fitted = about.get("code_shape", ""), about.get("fitted", "")
    if not re.fullmatch(r"[1-9]\d{0,6}(,[1-9]\d{0,6})?", shape) or not re.fullmatch(r"\d{1,12}", fitted):
        raise InputError(f"{source}: names no code_shape and number of codes; is it a prior that save wrote?")
    sizes = tuple(map(int, shape.split(",")))
    if prod(sizes) > 2**16:
        raise InputError(f"{source}: code_shape is {shape}, must be {2**16} numbers at most")
    return sizes, int(fitted)
