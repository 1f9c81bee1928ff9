"""An op of this package in your own torch module: cross-attention from positions to tokens, forward and backward.

    python examples/op_in_module.py

The ops take tensors, no modules, so your module keeps its own parameters and hands them over. Three things are printed:
which implementation serves these tensors and what speaks against the others; how far outputs and gradients are from
PyTorch's own attention (about 1e-6 in float32); and the same with the reference forced, which needs no compiler or GPU.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encdiff import explain, use_impl
from encdiff.ops import cross_attention


class CrossAttention(nn.Module):
    """y = softmax(q k^T / sqrt(d)) v, projected: x (B, L, C) attends to tokens (B, N, D); y (B, L, C)."""

    def __init__(self, channels: int, token_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(token_width, channels, bias=False)
        self.to_v = nn.Linear(token_width, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def weights(self) -> tuple[Tensor, ...]:
        return self.to_q.weight, self.to_k.weight, self.to_v.weight, self.to_out.weight, self.to_out.bias

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return cross_attention(x, tokens, *self.weights(), heads=self.heads)

    def stock(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The same by PyTorch's own ops."""
        q, k, v = self.to_q(x), self.to_k(tokens), self.to_v(tokens)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, L or N, d)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def distance(module: CrossAttention, x: Tensor, tokens: Tensor) -> float:
    """The greatest relative difference to PyTorch's ops: of the output and of every gradient."""
    wanted = [x, tokens, *module.parameters()]
    found = []
    for forward in (module, module.stock):
        y = forward(x, tokens)
        found.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*found, strict=True))


torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
layer = CrossAttention(channels=64, token_width=16, heads=4).to(device)
x = torch.randn(8, 256, 64, device=device, requires_grad=True)  # 16 x 16 positions
tokens = torch.randn(8, 20, 16, device=device, requires_grad=True)

print(explain(cross_attention, x, tokens, *layer.weights(), heads=layer.heads))
print(f"from PyTorch's ops: {distance(layer, x, tokens):.1e}")
with use_impl("reference"):
    print(f"from PyTorch's ops, by the reference: {distance(layer, x, tokens):.1e}")
