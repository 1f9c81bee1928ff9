"""What the benchmarks of ops share: which cases run, what a phase calls, the check before it is timed."""

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor

from bench.clock import Run

PHASES = ("forward", "forward_backward")
LAYERS = {"16x16": (256, 64), "8x8": (64, 128), "4x4": (16, 256), "2x2": (4, 256)}  # of the paper: positions, channels
GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32  # the one that decides


def cases(names: str, everything: Iterable[tuple], decides: Callable[..., bool]) -> pytest.MarkDecorator:
    """Parametrises by everything; what does not decide is marked `rest`, and runs with --all only."""
    marked = [pytest.param(*case, marks=[] if decides(*case) else pytest.mark.rest) for case in everything]
    return pytest.mark.parametrize(names, marked, ids=str)


def run_of(phase: str, op: Callable[..., Tensor], inputs: Sequence[Tensor], learnt: Iterable[Tensor] = ()) -> Run:
    """`op(*inputs)` without gradients, or with those of its inputs and of `learnt`."""
    if phase == "forward":
        return torch.no_grad()(lambda: op(*inputs))
    wanted, upstream = [*inputs, *learnt], torch.randn_like(op(*inputs))
    return lambda: torch.autograd.grad(op(*inputs), wanted, upstream)


def check(op: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor], bound: float) -> None:
    """Output and the gradient of every input against the reference in float64, before anything is timed."""
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y, expected = op(*inputs), reference(*exact)
    upstream = torch.randn_like(y)
    actual = [y, *torch.autograd.grad(y, inputs, upstream)]
    expected = [expected, *torch.autograd.grad(expected, exact, upstream.double())]
    for n, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a - e).norm() <= bound * e.norm(), f"gradient of input {n}" if n else "output"
