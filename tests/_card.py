"""A GPU that is not there: tensors lie on it, kernels are interpreted in its stead."""

import os
from collections import Counter

import torch

from encdiff.ops import _self_check
from encdiff.ops._check import check

CARD = "Fake 9000 (sm_90)"


def pretend(monkeypatch, cache) -> Counter:
    """Every tensor lies on the card; counts the checks that are made on it. `cache`: the user's folder of caches."""
    made = Counter()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(_self_check, "is_asked", lambda x: os.environ.get("ENCDIFF_SELF_CHECK") != "0")
    monkeypatch.setattr(_self_check, "is_there", lambda: True)
    monkeypatch.setattr(_self_check, "place", lambda device: torch.device("cpu"))
    monkeypatch.setattr(_self_check, "card", lambda device: CARD)
    monkeypatch.setattr(_self_check, "check", lambda f, v, g, d: made.update([f.name]) or check(f, v, g, d))
    forget(monkeypatch)
    return made


def forget(monkeypatch) -> None:
    """As a new process begins."""
    monkeypatch.setattr(_self_check, "_known", {})
    monkeypatch.setattr(_self_check, "_said", set())


def attention() -> dict[str, torch.Tensor]:
    """Of a size that takes the folded route."""
    shapes = {"x": (2, 256, 64), "context": (2, 20, 16)}
    shapes |= {"w_q": (64, 64), "w_k": (64, 16), "w_v": (64, 16), "w_o": (64, 64)}
    return {n: (torch.randn(s) / (s[-1] ** 0.5 if n[0] == "w" else 1)).bfloat16() for n, s in shapes.items()}
