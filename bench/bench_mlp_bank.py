"""The MLP bank with the paper's widths: the published loop over modules, batched products, the same compiled, Triton.

`predicted_us` in `extra_info` is a prediction by formula for the Triton kernels. At B = 128 an H100 took 6.6 us forward
and 93 with backward.
"""

from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.benchmark import Timer

from bench.baselines import compiled
from bench.cases import GPU, PHASES, cases, run_of
from encdiff.ops.mlp_bank import mlp_bank, mlp_bank_reference

CONCEPTS, WIDTHS = 20, (1, 64, 128, 16)
BATCHES = (1, 128, 1024, 8192)
IMPLS = ("published", "eager", "eager_compiled", "ours") if GPU else ("published", "eager", "eager_compiled")
MACS = sum(i * o for i, o in zip(WIDTHS, WIDTHS[1:], strict=False))  # of one concept and sample


class Published(nn.Module):
    """A module for each concept, called one after the other, as the published implementation does."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleList(
            nn.Sequential(nn.Linear(1, 64), nn.ELU(), nn.Linear(64, 128), nn.ELU(), nn.Linear(128, 16))
            for _ in range(CONCEPTS)
        )

    def forward(self, scalars):
        return torch.stack([mlp(scalars[:, i : i + 1]) for i, mlp in enumerate(self.net)], dim=1)

    def stacked(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        layers = [[mlp[i] for mlp in self.net] for i in (0, 2, 4)]
        return tuple(
            [torch.stack([getattr(m, name).detach() for m in layer]).requires_grad_() for layer in layers]
            for name in ("weight", "bias")
        )


def prepare(impl: str, device, smoke: bool = False):
    """(op, its parameters) of one implementation; the parameters' values are the same for all."""
    torch.manual_seed(0)
    loop = Published().to(device)
    if impl == "published":
        return loop, list(loop.parameters())
    weights, biases = loop.stacked()
    name = "triton" if impl == "ours" else "reference"

    def op(scalars):
        return mlp_bank(scalars, weights, biases, impl=name)

    return compiled(op, device, smoke) if impl == "eager_compiled" else op, [*weights, *biases]


def check(op, parameters, scalars, impl: str) -> None:
    """Tokens and the gradients of the scalars and, summed, of the parameters against float64, before timing."""
    weights, biases = op.stacked() if impl == "published" else (parameters[:3], parameters[3:])
    exact = [t.detach().double().requires_grad_() for t in (scalars, *weights, *biases)]
    expected = mlp_bank_reference(exact[0], exact[1:4], exact[4:])
    tokens = op(scalars)
    upstream = torch.randn_like(tokens)
    actual = torch.autograd.grad(tokens, [scalars, *parameters], upstream)
    gradients = torch.autograd.grad(expected, exact, upstream.double())
    assert (tokens - expected).norm() <= 1e-5 * expected.norm()
    assert (actual[0] - gradients[0]).norm() <= 1e-5 * gradients[0].norm()
    total, exact_total = (sum(g.double().square().sum() for g in gs[1:]) for gs in (actual, gradients))
    assert abs(total - exact_total) <= 1e-5 * exact_total


def cost(batch: int, parameters, phase: str) -> dict[str, int]:
    """Bytes of inputs and output once (with gradients: of both, and the inputs again), FLOP of the plain form."""
    read = 4 * (batch * CONCEPTS + sum(p.numel() for p in parameters))
    written = 4 * batch * CONCEPTS * WIDTHS[-1]
    forward = 2 * batch * CONCEPTS * MACS
    if phase == "forward":
        return {"bytes": read + written, "flops": forward}
    return {"bytes": 3 * read + 2 * written, "flops": 3 * forward}


def predicted_us(batch: int, phase: str) -> float:
    """launches * 3 us + multiply-adds / (132 multiprocessors * 128 per cycle * 1700 cycles per us / 4).

    The quarter is what plain float32 products on small tiles are assumed to reach of the card's peak. Forward: one
    launch, one product per weight. With backward: three launches, four products (recomputed, two gradients).
    """
    launches, products = (1, 1) if phase == "forward" else (3, 4)
    return 3 * launches + products * batch * CONCEPTS * MACS / (132 * 128 * 1700 / 4)


def decides(batch, phase, impl) -> bool:
    return batch == 128 and impl != ("eager" if GPU else "ours")


@cases("batch, phase, impl", product(BATCHES, PHASES, IMPLS), decides)
def test_mlp_bank(measure, benchmark, rotated, smoke, device, batch, phase, impl):
    batch = min(batch, 8) if smoke else batch
    op, parameters = prepare(impl, device, smoke)
    costs = cost(batch, parameters, phase)
    sets = rotated(lambda: torch.randn(batch, CONCEPTS, device=device, requires_grad=True), costs["bytes"])
    check(op, parameters, sets[0], impl)
    benchmark.extra_info["predicted_us"] = predicted_us(batch, phase) if impl == "ours" else None
    shape = f"B={batch} N={CONCEPTS} widths={'-'.join(map(str, WIDTHS))}"
    labels = {"op": "mlp_bank", "impl": impl, "phase": phase, "shape": shape}
    runs = [run_of(phase, op, [scalars], parameters) for scalars in sets]
    measure(runs, **labels, dtype=torch.float32, **costs)


def test_twice_as_fast_as_the_published_loop(benchmark, device):
    """Forward at B = 128, in turns in one run, the best of each."""
    if benchmark.disabled:
        pytest.skip("a ratio of times means nothing in a smoke test")
    scalars = torch.randn(128, CONCEPTS, device=device)
    ops = {impl: prepare(impl, device)[0] for impl in ("published", "eager")}
    best = dict.fromkeys(ops, float("inf"))
    with torch.no_grad():
        for impl in [*ops] * 5:
            names = {"op": ops[impl], "scalars": scalars}
            timer = Timer("op(scalars)", "op(scalars)", globals=names, num_threads=torch.get_num_threads())
            best[impl] = min(best[impl], *timer.blocked_autorange(min_run_time=0.2).times)
        benchmark.extra_info.update({f"{impl}_ms": 1e3 * seconds for impl, seconds in best.items()})
        benchmark(lambda: ops["eager"](scalars))
    assert best["published"] >= 2 * best["eager"], best
