"""One step of the optimiser on the paper's 38.8 million weights: torch's fused AdamW with average and copy, ours.

`bytes` counts what any form must move: gradient in bfloat16, master and moments in and out, the bfloat16 copy out, and
for the U-Net's 37.5 million the average in and out: 28 and 8 bytes an element, 1.39 GB, 0.53 ms at 2.6 TB/s: predicted,
not measured.
"""

import torch

from bench.cases import cases
from encdiff.ops.adamw import adamw, adamw_reference

PAPER, SMALL = (38_842_240, 37_469_696), (2**20, 2**20 - 4096)  # weights, averaged ones
CONSTANTS = {"betas": (0.9, 0.999), "weight_decay": 0.01}


def buffers(n: int, k: int, device) -> dict[str, torch.Tensor]:
    made = {name: torch.randn(n, device=device) for name in ("master", "exp_avg")}
    made["exp_avg_sq"] = torch.rand(n, device=device)
    made["gradient"] = torch.randn(n, device=device).bfloat16()
    made["schedule"] = torch.tensor([1e-4, 1e-4, 0.9, 0.1], device=device)
    return made | {"average": made["master"][:k].clone(), "weights": made["master"].bfloat16()}


def by_torch(made: dict[str, torch.Tensor]):
    """The fused optimiser, which takes gradients of the master's type, then average and copy."""
    master, k = torch.nn.Parameter(made["master"]), len(made["average"])
    optimizer = torch.optim.AdamW([master], 1e-4, **CONSTANTS, fused=True, capturable=master.is_cuda)

    def step():
        master.grad = made["gradient"].float()
        optimizer.step()
        with torch.no_grad():
            made["average"].lerp_(master[:k], made["schedule"][1])
            made["weights"].copy_(master)

    return step


def check(made: dict[str, torch.Tensor]) -> None:
    """A step against the reference in float64."""
    ours = {name: t.clone() for name, t in made.items()}
    exact = {name: t.clone() if name in ("gradient", "weights") else t.double() for name, t in made.items()}
    adamw(**ours, **CONSTANTS)
    adamw_reference(**exact, **CONSTANTS)
    for name in ("master", "exp_avg", "exp_avg_sq", "average"):
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["weights"].float(), ours["master"], rtol=2**-8, atol=0)


@cases(
    "size, impl", [(s, i) for s in ("paper", "small") for i in ("torch", "ours")], lambda size, impl: size == "paper"
)
def test_adamw(measure, smoke, device, size, impl):
    n, k = SMALL if smoke or size == "small" else PAPER
    made = buffers(n, k, device)
    check(made)
    run = by_torch(made) if impl == "torch" else lambda: adamw(**made, **CONSTANTS)
    labels = {"op": "adamw", "impl": impl, "phase": "step", "shape": f"n={n} k={k}"}
    measure(run, **labels, dtype=torch.float32, bytes=28 * n + 8 * k, flops=16 * n + 3 * k)
