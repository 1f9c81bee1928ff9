"""Cross-attention in Triton. The contract is that of `encdiff.ops.cross_attention`, which checks it and projects.

Two routes, chosen by `_cross_attention_plan`: `_cross_attention_folded` does everything from LayerNorm to residual in
one pass, `_cross_attention_heads` the attention between projections. `_cross_attention_kept` is for sampling alone.
"""

from collections.abc import Iterator

from . import _cross_attention_folded, _cross_attention_heads, _cross_attention_kept
from ._cross_attention_folded import cross_attention_folded, whole_heads
from ._cross_attention_heads import cross_attention_heads
from ._cross_attention_kept import cross_attention_kept
from ._gate import GateCase

__all__ = ["cross_attention_folded", "cross_attention_heads", "cross_attention_kept", "gate_cases", "whole_heads"]


def gate_cases() -> Iterator[GateCase]:
    yield from _cross_attention_folded.gate_cases()
    yield from _cross_attention_heads.gate_cases()
    yield from _cross_attention_kept.gate_cases()
