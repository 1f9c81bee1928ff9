"""The per-head kernels of cross-attention with many tokens, which they take in turn, against float64."""

import pytest
import torch
from encdiff.kernels.cross_attention import cross_attention_heads
from encdiff.kernels.cross_attention.plan import is_tiled

from encdiff.ops._attention import merge_heads, softmax, split_heads
from encdiff.ops._check import LIMITS, TYPES, relative_error

pytestmark = pytest.mark.on_gpu
HEADS = 2
MASKS = {  # of sample 1, or of one of its heads
    "none": (),
    "the first tile": (1, slice(None), slice(128)),
    "the last tile of one head": (1, 1, slice(-128, None)),
    "every token": (1,),
    "all but the last token": (1, slice(None), slice(-1)),
}


def formula(q, k, v, bias):
    q, k, v = (split_heads(t, HEADS) for t in (q, k, v))
    p = softmax(q @ k.mT * q.shape[-1] ** -0.5, bias)
    return merge_heads(p @ v), p


def compare(L, N, width, dtype, mask="none", scale=1.0) -> None:
    """Output, maps and every gradient."""
    assert is_tiled(N, width, TYPES[dtype].itemsize)
    B = 1 if mask == "none" else 2
    inputs = [torch.randn(B, n, HEADS * width).to(TYPES[dtype]) for n in (L, N, N)] + [torch.randn(B, HEADS, N)]
    inputs[0] *= scale
    if mask != "none":
        inputs[3][MASKS[mask]] = -torch.inf
    given, exact = ([t.to(of or t.dtype, copy=True).requires_grad_() for t in inputs] for of in (None, torch.float64))
    o, _, p = cross_attention_heads(*given, HEADS, width**-0.5, True)
    expected_o, expected_p = formula(*exact)
    upstream = torch.randn(o.shape).to(o.dtype)
    actual = [o, p, *torch.autograd.grad(o, given, upstream)]
    expected = [expected_o, expected_p, *torch.autograd.grad(expected_o, exact, upstream.double())]
    for name, mine, theirs in zip(("o", "maps", "dq", "dk", "dv", "dbias"), actual, expected, strict=True):
        assert relative_error(mine, theirs.detach().cpu()) <= LIMITS[dtype], name
    if mask == "every token":
        assert all((t[1] == 0).all() for t in (o, *actual[2:]))
    elif mask != "none":
        assert (p[1][MASKS[mask][1], :, MASKS[mask][2]] == 0).all()


@pytest.mark.parametrize(
    "L, N, width, dtype",
    [
        (1, 1000, 80, "bfloat16"),
        (17, 154, 160, "float16"),
        (100, 129, 40, "bfloat16"),
        (130, 256, 64, "float16"),
        (17, 200, 8, "float32"),
        (17, 257, 64, "float32"),
    ],
)
def test_sizes(L, N, width, dtype):
    compare(L, N, width, dtype)


@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "none"])
def test_masks(mask):
    compare(5, 257, 8, "bfloat16", mask)


def test_gradients_where_one_token_has_all_of_the_attention():
    """P dP and the sum of it over the tokens then cancel; what is left must not be the rounding of one of them."""
    compare(17, 300, 80, "bfloat16", scale=100.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_of_ten_thousands_do_not_overflow(dtype):
    q, k, v = (torch.randn(1, n, HEADS * 40).to(TYPES[dtype]) for n in (17, 300, 300))
    q *= 1e4
    given = [t.requires_grad_() for t in (q, k, v)]
    o, lse, p = cross_attention_heads(*given, None, HEADS, 40**-0.5, True)
    assert all(t.isfinite().all() for t in (o, lse, p, *torch.autograd.grad(o.sum(), given)))
    rounding = 1e4 * torch.finfo(torch.float32).eps  # of the logits, of which it takes the exponentials
    for mine, theirs in zip((o, p), formula(*(t.detach().double() for t in given), None), strict=True):
        assert relative_error(mine.detach(), theirs.cpu()) <= rounding + LIMITS[dtype]
