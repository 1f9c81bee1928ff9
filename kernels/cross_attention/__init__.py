"""Cross-attention in Triton. The contract is that of `encdiff.ops.cross_attention`, which checks it and projects.

Two routes, chosen by `plan`: `folded` does everything from LayerNorm to residual in one pass, `heads` the attention
between projections. `plan` is plain Python, so this package loads Triton for a kernel only.
"""

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["cross_attention_folded", "cross_attention_heads", "gate_cases", "whole_heads"]

if TYPE_CHECKING:
    from .._gate import GateCase
    from .folded import cross_attention_folded, whole_heads
    from .heads import cross_attention_heads

_HOMES = {
    "cross_attention_folded": "folded",
    "whole_heads": "folded",
    "cross_attention_heads": "heads",
}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def gate_cases() -> "Iterator[GateCase]":
    for module in ("folded", "heads"):
        yield from import_module(f".{module}", __name__).gate_cases()
