"""What autograd does around the kernels: nothing for outputs without a gradient, and nothing twice."""

import pytest
import torch
from encdiff.kernels import cross_attention, group_norm, self_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.on_gpu


class Called(TorchDispatchMode):
    """The names of the operators of one block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


class Absent(torch.autograd.Function):
    """Passes its input on, and no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


def _group_norm(x):
    return group_norm.group_norm(x, torch.ones(16), torch.ones(16), None, None, None, 4, 1e-5, True)


def _folded(x):
    tokens = x.unflatten(1, (2, 3))
    return cross_attention.cross_attention_folded(x, tokens, tokens, None, None, None, None, 1e-5, True, "none")


def _heads(x):
    return cross_attention.cross_attention_heads(x, x, x, None, 2, 0.3, False)


def _self(x):
    return self_attention.self_attention(x.repeat(1, 1, 3), 2, 0.3)


OPS = {"group_norm": _group_norm, "folded": _folded, "heads": _heads, "self_attention": _self}


@pytest.mark.parametrize("op", OPS)
def test_backward_makes_no_zero_gradients(op):
    x = torch.randn(2, 6, 16, requires_grad=True)
    y, *others = OPS[op](x)
    assert others and not any(t.requires_grad for t in others)
    upstream = torch.randn_like(y)
    with Called() as called:
        y.backward(upstream)
    assert any("backward" in name or "bwd" in name for name in called.names)
    assert not [name for name in called.names if "zero" in name]
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("op", OPS)
def test_no_gradient_leads_to_none(op):
    x = torch.randn(2, 6, 16, requires_grad=True)
    y, *_ = OPS[op](x)
    with Called() as called:
        (dx,) = torch.autograd.grad(Absent.apply(y).sum(), x, allow_unused=True)
    assert dx is None
    assert not any("backward" in name or "bwd" in name for name in called.names)


@pytest.mark.parametrize("op", OPS)
def test_gradients_under_activation_checkpointing(op):
    """Saved tensors come back once there."""
    x, upstream = torch.randn(2, 6, 16, requires_grad=True), torch.randn(2, 6, 16)
    y = checkpoint(lambda x: OPS[op](x)[0], x, use_reentrant=False)
    actual, expected = (torch.autograd.grad(y, x, upstream) for y in (y, OPS[op](x)[0]))
    torch.testing.assert_close(actual, expected)
