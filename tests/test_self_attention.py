import pytest
import torch
from torch.nn import functional as F

from encdiff import ops
from encdiff.errors import InputError
from encdiff.ops._attention import layer_norm


def weights(C, inner):
    return [torch.randn(inner, C, dtype=torch.float64) / C**0.5 for _ in range(3)] + [
        torch.randn(C, inner, dtype=torch.float64)
    ]


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
@pytest.mark.parametrize("B, L, C, heads, width", [(2, 16, 8, 2, 4), (3, 7, 10, 1, 3), (1, 1, 6, 3, 5)])
def test_is_cross_attention_to_itself(B, L, C, heads, width, impl):
    torch.manual_seed(L)
    x, w = torch.randn(B, L, C, dtype=torch.float64), weights(C, heads * width)
    b_o, gamma, beta = torch.randn(3, C, dtype=torch.float64)
    with ops.record_impls() as ran:
        y = ops.self_attention(x, *w, b_o, heads=heads, norm_weight=gamma, norm_bias=beta, residual=True, impl=impl)
    assert ran == [("self_attention", impl)]
    h = F.layer_norm(x, (C,), gamma, beta)
    torch.testing.assert_close(y, x + ops.cross_attention(h, h, *w, b_o, heads=heads, impl="reference"))


def test_gradcheck():
    torch.manual_seed(0)
    leaves = [torch.randn(2, 3, 4, dtype=torch.float64), *weights(4, 4), *torch.randn(3, 4, dtype=torch.float64)]

    def f(x, w_q, w_k, w_v, w_o, b_o, gamma, beta):
        norm = dict(norm_weight=gamma, norm_bias=beta)
        return ops.self_attention(x, w_q, w_k, w_v, w_o, b_o, heads=2, residual=True, impl="reference", **norm)

    assert torch.autograd.gradcheck(f, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("B, L", [(0, 5), (2, 0)])
def test_empty(B, L):
    assert ops.self_attention(torch.zeros(B, L, 8).double(), *weights(8, 8), heads=2).shape == (B, L, 8)


def test_bad_input():
    x, w = torch.zeros(2, 4, 8).double(), weights(8, 6)
    with pytest.raises(InputError, match="heads 4 must divide the 6 rows of w_q"):
        ops.self_attention(x, *w, heads=4)
    with pytest.raises(InputError, match=r"w_o is \(6, 8\), must be \(8, 6\)"):
        ops.self_attention(x, *w[:3], w[3].T, heads=2)
    with pytest.raises(InputError, match=r"x is \(4, 8\), must be \(B, L, C\)"):
        ops.self_attention(x[0], *w, heads=2)


def test_float32_norm_weights_are_not_rounded_to_a_half_precision_input():
    x = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    gamma, beta = torch.rand(8) + 1, torch.randn(8)
    assert torch.equal(layer_norm(x, gamma, beta, 1e-5), F.layer_norm(x.float(), (8,), gamma, beta).bfloat16())
