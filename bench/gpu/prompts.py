"""Block `prompts`: cross-attention at Stable Diffusion's sizes, ours by heads beside PyTorch's fused one, float16."""

import torch

from bench.clock import replayed
from bench.gpu.lab import Lab
from encdiff import ops

# queries, channels, tokens, their width, heads
SHAPES = (
    (4096, 320, 77, 768, 8), (1024, 640, 77, 768, 8), (1024, 640, 257, 768, 8), (256, 1280, 77, 768, 8),
    (64, 1280, 77, 768, 8), (1024, 640, 77, 2048, 10), (256, 1280, 77, 2048, 20),
)  # fmt: skip
BATCHES = (2, 16)


def measure(lab: Lab) -> dict:
    """Microseconds [forward without gradients, forward and backward] with LayerNorm, projections and residual."""
    found: dict[str, dict] = {}
    half = torch.float32 if lab.cpu else torch.float16
    for L, C, N, D, heads in ((16, 64, 9, 32, 2),) if lab.cpu else SHAPES:
        for batch in BATCHES[:1] if lab.cpu else BATCHES:
            name = f"{L}x{C}, {N} tokens of {D}, {heads} heads, batch {batch}"
            shapes = (batch, L, C), (batch, N, D), (C, C), (C, D), (C, D), (C, C)
            leaves = [torch.randn(s, device=lab.device, dtype=half) / s[-1] ** 0.5 for s in shapes]
            rest = [torch.randn(C, device=lab.device, dtype=half) for _ in range(3)]
            found[name] = {impl: times(lab, impl, heads, leaves, rest) for impl in ("triton", "sdpa")}
            lab.save("prompts", found)
    return found


def times(lab: Lab, impl: str, heads: int, leaves: list, rest: list) -> list[float] | str:
    bias, gamma, beta = rest
    options = {"heads": heads, "norm_weight": gamma, "norm_bias": beta, "residual": True, "impl": impl}
    learnt = [t.detach().requires_grad_() for t in leaves]
    upstream = torch.randn_like(leaves[0])

    def forward():
        with torch.no_grad():
            return ops.cross_attention(*leaves, bias, **options)

    def both():
        return torch.autograd.grad(ops.cross_attention(*learnt, bias, **options), learnt, upstream)

    try:
        return [1e6 * replayed(run, lab.device, calls=5, repeats=3) for run in (forward, both)]
    except Exception as error:
        if type(error).__name__ == "Late":
            raise
        return f"{type(error).__name__}: {str(error)[:200]}"


def lines(found: dict) -> list[str]:
    def said(t: list[float] | str) -> str:
        return t if isinstance(t, str) else "/".join(f"{us:.1f}" for us in t)

    return [f"{name}, us: " + ", ".join(f"{n} {said(t)}" for n, t in row.items()) for name, row in found.items()]
