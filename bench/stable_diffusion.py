"""Stable Diffusion's cross-attentions on a CPU: every implementation in turns in one run, the medians.

    OMP_NUM_THREADS=1 python -m bench.stable_diffusion [seconds of each case]

One sample, without LayerNorm, as diffusers calls it; `mask` leaves half of the tokens out, as what fills a prompt up;
`learnt`: a bias with a gradient. `chosen` is what `ops.cross_attention` takes. A figure is milliseconds, behind it the
ratio to PyTorch's fused attention.
"""

import statistics
import sys
import time
from itertools import product

import torch
from torch import Tensor

from bench.bench_cross_attention import STABLE_DIFFUSION, inputs
from bench.cases import PHASES, check, run_of
from bench.clock import Run, warm_up
from encdiff.errors import InputError
from encdiff.ops import record_impls
from encdiff.ops.cross_attention import cross_attention

HEADS = 8
IMPLS = ("sdpa", "native", "transposed", "reference")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def token_bias(kind: str, tokens: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "learnt":
        return torch.randn(1, tokens).requires_grad_()
    return torch.zeros(1, tokens).masked_fill(torch.arange(tokens) >= tokens // 2, -torch.inf)


def case(name: str, kind: str, phase: str, dtype: torch.dtype) -> tuple[str, dict[str, Run]]:
    """What is chosen, and a run of each implementation that serves; each is checked first."""
    queries, channels, tokens, width = STABLE_DIFFUSION[name]
    tensors = inputs(1, queries, channels, tokens, width, torch.device("cpu"), dtype)[:7]
    bias, runs = token_bias(kind, tokens), {}

    def op(impl):
        return lambda *given: cross_attention(*given, heads=HEADS, residual=True, token_bias=bias, impl=impl)

    for impl in IMPLS:
        try:
            check(op(impl), op("reference"), tensors, TOLERANCE[dtype])
        except InputError:
            continue
        runs[impl] = run_of(phase, op(impl), tensors, [] if kind != "learnt" else [bias])
    with record_impls() as ran:
        op(None)(*tensors)
    return ran[0][1], runs


def medians(runs: dict[str, Run], seconds: float) -> dict[str, float]:
    warm_up(list(runs.values()), 5.0)
    taken, end = {name: [] for name in runs}, time.monotonic() + seconds
    while time.monotonic() < end or len(taken["sdpa"]) < 5:
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in taken.items()}


if __name__ == "__main__":
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    for name, kind, phase, dtype in product(
        STABLE_DIFFUSION, ("none", "mask", "learnt"), PHASES, (torch.float32, torch.bfloat16)
    ):
        if kind != "learnt" or phase == "forward_backward":
            chosen, runs = case(name, kind, phase, dtype)
            found = medians(runs, seconds)
            figures = "  ".join(f"{impl} {1e3 * t:.1f} ({t / found['sdpa']:.2f})" for impl, t in found.items())
            print(f"{name}, bias {kind}, {phase}, {str(dtype)[6:]}: chosen {chosen}: {figures}", flush=True)
