"""What every block is given."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.baselines import PAPER, SMOKE
from encdiff.models import EncDiffConfig


class Late(Exception):
    """A block's time is up."""


@dataclass
class Lab:
    """Where results go, what is measured, and when it must end."""

    out: Path
    caches: Path  # what a later call can use again
    cpu: bool
    end: float
    rates: dict[str, float] = field(default_factory=dict)  # bytes/s of a copy, FLOP/s of products: of block `machine`

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.cpu else "cuda")

    @property
    def config(self) -> EncDiffConfig:
        return SMOKE if self.cpu else PAPER

    @property
    def batch(self) -> int:
        return 2 if self.cpu else 128

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def save(self, name: str, result: object) -> None:
        path = self.out / f"{name}.json"
        path.with_suffix(".part").write_text(json.dumps(result, indent=1))
        path.with_suffix(".part").replace(path)

    def load(self, name: str):
        path = self.out / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises `Late` inside the block once its time is up."""

    def ring(*_):
        raise Late(f"out of time after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
