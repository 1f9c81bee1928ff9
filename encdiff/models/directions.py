"""A linear direction in the codes, such as one fitted to labels, and its file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from encdiff.checked import Checked, Range
from encdiff.errors import InputError
from encdiff.files.checkpoint import load_tensors, save_tensors

Score = Annotated[float, Range(-1e30, 1e30)]  # not NaN
TENSORS, NUMBERS, TEXTS = ("vector", "deviations"), ("score", "baseline"), ("kind", "score_name", "name")


@dataclass(frozen=True, eq=False)
class Direction(Checked):
    """What `encdiff.evaluation.fit_direction` finds and `EncDiff.edit` follows.

    `vector` float32 (N,), or (N, m) where a concept is a vector, is the change of the codes per unit of strength;
    `deviations`, of the same shape, are the standard deviations of the codes that it was fitted on. `score`, on rows
    held out, is what `score_name` says; `baseline` is the same with shuffled labels. `name` says what the labels were.
    """

    vector: Tensor
    deviations: Tensor
    kind: Literal["logistic", "ridge"]
    score: Score
    score_name: str
    baseline: Score
    name: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in TENSORS:
            held = getattr(self, name)
            shape = self.vector.shape if self.vector.ndim in (1, 2) else ("N",)
            if held.shape != shape or held.dtype != torch.float32 or not held.isfinite().all():
                wanted = f"finite float32 numbers ({', '.join(map(str, shape))})"
                raise InputError(f"{name} is {held.dtype} {tuple(held.shape)}, must be {wanted}")

    def ranked(self) -> list[tuple[int, float]]:
        """Concepts and how far each moves per unit of strength, in its own standard deviations; the furthest first.

        Of a concept that is a vector it is the length of what its numbers move by.
        """
        moved = self.vector / self.deviations.where(self.deviations > 0, torch.ones(()))
        moved = moved if moved.ndim == 1 else moved.norm(dim=1)
        return [(i, float(moved[i])) for i in moved.abs().argsort(descending=True).tolist()]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all, that `load_direction` reads."""
        about = {name: str(getattr(self, name)) for name in (*NUMBERS, *TEXTS)}
        save_tensors(path, {name: getattr(self, name) for name in TENSORS}, about)


def load_direction(path: str | Path) -> Direction:
    """The direction that `Direction.save` wrote; InputError, naming the file, for anything else."""
    tensors, about = load_tensors(path)
    lacking = sorted({*TENSORS} ^ tensors.keys()) + sorted({*NUMBERS, *TEXTS} - about.keys())
    if lacking:
        raise InputError(f"{path}: not a direction that encdiff saved ({', '.join(lacking)[:200]})")
    try:
        values: dict[str, Any] = {**tensors, **{name: about[name] for name in TEXTS}}
        values |= {name: float(about[name]) for name in NUMBERS}
        return Direction(**values)
    except ValueError as error:  # an InputError is one
        raise InputError(f"{path}: not a direction that encdiff saved ({error})") from None
