import math
import sys
from types import SimpleNamespace

import pytest
import torch
from _golden import draw, load, relative_error, weight
from torch.nn import functional as F

from encdiff import ops
from encdiff.errors import InputError

TRITON = pytest.param("triton", marks=pytest.mark.on_gpu)
IMPLS = ["auto", TRITON, "native", "transposed", "sdpa", "reference"]
PLAIN = IMPLS[3:]  # these take float64 as well
WITH_MAPS = ["transposed", "reference"]
WEIGHTS = ("w_q", "w_k", "w_v", "w_o", "b_o")


def inputs(B, L, C, N, D, heads, width, dtype=torch.float64, seed=0):
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    inner = heads * width
    weights = [
        normal(inner, C) / C**0.5,
        normal(inner, D) / D**0.5,
        normal(inner, D) / D**0.5,
        normal(C, inner) / inner**0.5,
    ]
    return normal(B, L, C), normal(B, N, D), weights, normal(C)


def by_loops(x, tokens, weights, b_o, heads, bias=None):
    """The formula, one head and one query at a time, in float64."""
    w_q, w_k, w_v, w_o = (w.double() for w in weights)
    x, tokens = x.double(), tokens.double()
    d = w_q.shape[0] // heads
    y, maps = torch.zeros_like(x), torch.zeros(x.shape[0], heads, x.shape[1], tokens.shape[1], dtype=torch.float64)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            out = []
            for h in range(heads):
                rows = slice(h * d, (h + 1) * d)
                logits = (tokens[b] @ w_k[rows].T) @ (w_q[rows] @ x[b, i]) / math.sqrt(d)
                p = torch.softmax(logits if bias is None else logits + bias[b, h], 0)
                maps[b, h, i] = p
                out.append(p @ (tokens[b] @ w_v[rows].T))
            y[b, i] = w_o @ torch.cat(out) + (0 if b_o is None else b_o.double())
    return y, maps


CASES = {  # B, L, C, N, D, heads, head width
    "paper 16x16": (2, 16, 64, 20, 16, 8, 8),
    "odd sizes": (3, 7, 10, 13, 5, 2, 9),
    "one token": (2, 5, 8, 1, 3, 1, 4),
    "inner wider than C": (1, 4, 6, 3, 7, 3, 8),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["xattn_a", "xattn_b", "xattn_c"])
def test_published_outputs_and_gradients(name, impl):
    golden = load(name)
    C, D, heads, width, B, L, N = golden["dims"].tolist()
    inner = heads * width
    shapes = {"to_q": (inner, C), "to_k": (inner, D), "to_v": (inner, D), "to_out.0": (C, inner)}
    w = {k: weight(f"{name}.{k}.weight", s).requires_grad_() for k, s in shapes.items()}
    bias = weight(f"{name}.to_out.0.bias", (C,)).requires_grad_()
    x, context = draw(f"{name}:x", (B, L, C)).requires_grad_(), draw(f"{name}:context", (B, N, D)).requires_grad_()
    with ops.use_impl(impl):
        y = ops.cross_attention(x, context, *w.values(), bias, heads=heads)
    y.backward(draw(f"{name}:grad_out", y.shape))
    assert relative_error(y, golden["y"]) < 1e-4
    gradients = {"grad_x": x, "grad_context": context, "grad:to_out.0.bias": bias}
    gradients |= {f"grad:{k}.weight": v for k, v in w.items()}
    for key, tensor in gradients.items():
        assert relative_error(tensor.grad, golden[key]) < 1e-3, key


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("case", CASES)
def test_against_the_formula(case, impl):
    heads, width = CASES[case][5:]
    x, tokens, weights, b_o = inputs(*CASES[case])
    with ops.record_impls() as ran:
        y = ops.cross_attention(x, tokens, *weights, b_o, heads=heads, impl=impl)
    assert ran == [("cross_attention", impl)]
    torch.testing.assert_close(y, by_loops(x, tokens, weights, b_o, heads)[0])


@pytest.mark.parametrize("case", CASES)
def test_native_against_the_formula(case):
    heads, _ = CASES[case][5:]
    x, tokens, weights, b_o = inputs(*CASES[case])
    exact = [t.clone().requires_grad_() for t in (x, tokens, *weights, b_o)]
    given = [t.float().requires_grad_() for t in (x, tokens, *weights, b_o)]
    with ops.record_impls() as ran:
        y = ops.cross_attention(*given, heads=heads, impl="native")
    expected = by_loops(*exact[:2], exact[2:6], exact[6], heads)[0]
    assert ran == [("cross_attention", "native")]
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    y.backward(upstream.float())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(given, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", PLAIN)
def test_norm_residual_and_strides(impl):
    x, tokens, weights, b_o = inputs(2, 12, 10, 3, 5, 2, 4)
    gamma, beta = torch.randn(10, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    feature_map = x.transpose(1, 2).contiguous().transpose(1, 2)  # as an NCHW feature map enters
    y = ops.cross_attention(
        feature_map,
        tokens,
        *weights,
        b_o,
        heads=2,
        norm_weight=gamma,
        norm_bias=beta,
        norm_eps=1e-3,
        residual=True,
        impl=impl,
    )
    normed = F.layer_norm(x, (10,), gamma, beta, 1e-3)
    torch.testing.assert_close(y, x + by_loops(normed, tokens, weights, b_o, 2)[0])


@pytest.mark.parametrize("impl", WITH_MAPS)
@pytest.mark.parametrize("maps", ["head", "mean"])
def test_maps_come_from_the_same_pass(maps, impl):
    x, tokens, weights, b_o = inputs(2, 6, 10, 5, 4, 2, 3)
    y, attention = ops.cross_attention(x, tokens, *weights, b_o, heads=2, maps=maps, impl=impl)
    expected_y, expected = by_loops(x, tokens, weights, b_o, 2)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(attention, expected if maps == "head" else expected.mean(1))


@pytest.mark.on_gpu
def test_maps_have_a_gradient():
    x, tokens, weights, b_o = inputs(2, 3, 10, 5, 4, 2, 3)
    leaves = [t.requires_grad_() for t in (x, tokens, weights[0], weights[1])]
    upstream = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    expected = torch.autograd.grad((by_loops(x, tokens, weights, b_o, 2)[1] * upstream).sum(), leaves)
    _, attention = ops.cross_attention(x, tokens, *weights, b_o, heads=2, maps="head")
    torch.testing.assert_close(torch.autograd.grad((attention * upstream).sum(), leaves), expected)
    single = [t.detach().float().requires_grad_() for t in (x, tokens, *weights, b_o)]
    why = ops.explain("cross_attention", *single, heads=2, maps="head")
    assert "triton: attention maps have no gradient there" in why  # so they come from an implementation that has one


@pytest.mark.parametrize("impl", WITH_MAPS)
@pytest.mark.parametrize("maps", [None, "mean"])
def test_samples_do_not_depend_on_how_many_are_taken_together(maps, impl):
    x, tokens, weights, b_o = inputs(7, 300, 8, 50, 4, 8, 4, torch.float32)  # 120,000 logits a sample: two at a time
    bias = torch.randn(7, 8, 50)
    arguments = lambda i: dict(x=x[i], context=tokens[i], token_bias=bias[i], heads=8, maps=maps, impl=impl)  # noqa: E731
    whole = ops.cross_attention(**arguments(slice(None)), **dict(zip(WEIGHTS, (*weights, b_o), strict=True)))
    for i in range(7):
        one = ops.cross_attention(**arguments(slice(i, i + 1)), **dict(zip(WEIGHTS, (*weights, b_o), strict=True)))
        for a, e in zip([one] if maps is None else one, [whole] if maps is None else whole, strict=True):
            torch.testing.assert_close(a[0], e[i])


@pytest.mark.parametrize("impl", WITH_MAPS)
@pytest.mark.parametrize("per_head", [False, True])
def test_token_bias_masks_and_emphasises(per_head, impl):
    x, tokens, weights, b_o = inputs(2, 6, 10, 5, 4, 2, 3)
    bias = torch.randn(2, 2, 5, dtype=torch.float64) if per_head else torch.randn(2, 5, dtype=torch.float64)
    bias[..., 3] = -torch.inf
    y, attention = ops.cross_attention(x, tokens, *weights, b_o, heads=2, token_bias=bias, maps="head", impl=impl)
    expected = by_loops(x, tokens, weights, b_o, 2, bias if per_head else bias[:, None].expand(2, 2, 5))
    torch.testing.assert_close((y, attention), expected)
    assert (attention[..., 3] == 0).all()


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("per_head", [False, True])
def test_gradients_with_a_token_bias(per_head, impl):
    """With that of the bias; a bias that is only given takes another path through PyTorch's fused attention."""
    x, tokens, weights, b_o = inputs(2, 6, 10, 5, 4, 2, 3)
    bias = torch.randn(2, 2, 5, dtype=torch.float64) if per_head else torch.randn(2, 5, dtype=torch.float64)
    bias[0, ..., 3] = -torch.inf
    upstream = torch.randn_like(x)
    leaves = [t.requires_grad_() for t in (x, tokens, *weights, b_o)]
    for learnt in (True, False):
        bias.requires_grad_(learnt)
        wanted = [*leaves, bias] if learnt else leaves
        y = ops.cross_attention(x, tokens, *weights, b_o, heads=2, token_bias=bias, impl=impl)
        expected = by_loops(x, tokens, weights, b_o, 2, bias if per_head else bias[:, None].expand(2, 2, 5))[0]
        torch.testing.assert_close(y, expected)
        actual, expected = (torch.autograd.grad(out, wanted, upstream) for out in (y, expected))
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("learnt", [False, True])
def test_a_fully_masked_row_attends_to_nothing(learnt, impl):
    x, tokens, weights, b_o = inputs(2, 6, 10, 5, 4, 2, 3)
    x.requires_grad_()
    bias = torch.zeros(2, 5, dtype=torch.float64)
    bias[1] = -torch.inf
    bias.requires_grad_(learnt)
    y = ops.cross_attention(x, tokens, *weights, b_o, heads=2, token_bias=bias, impl=impl)
    torch.testing.assert_close(y[1], b_o.expand(6, 10))
    y.sum().backward()
    assert x.grad.isfinite().all() and (x.grad[1] == 0).all() and (x.grad[0] != 0).any()
    if learnt:
        assert bias.grad.isfinite().all() and (bias.grad[1] == 0).all() and (bias.grad[0] != 0).any()


@pytest.mark.parametrize("impl", PLAIN)
def test_a_head_without_tokens_leaves_the_others(impl):
    x, tokens, weights, b_o = inputs(2, 6, 10, 5, 4, 2, 3)
    bias = torch.randn(2, 2, 5, dtype=torch.float64)
    bias[0, 1] = -torch.inf
    y = ops.cross_attention(x, tokens, *weights, b_o, heads=2, token_bias=bias, impl=impl)
    weights[2][3:] = 0  # the values of head 1
    expected = by_loops(x[:1], tokens[:1], weights, b_o, 2, bias[:1, :1].expand(1, 2, 5))[0]
    torch.testing.assert_close(y[:1], expected)


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_lowest_finite_bias_masks_no_row_whole(dtype, impl):
    """A common mask; of logits that are all so low each token has its share."""
    x, tokens, weights, b_o = inputs(2, 6, 10, 5, 4, 2, 3, dtype)
    bias = torch.full((2, 5), torch.finfo(torch.float32).min)
    bias[0, 2] = 0.0
    y = ops.cross_attention(x, tokens, *weights, b_o, heads=2, token_bias=bias, impl=impl)
    assert (y - b_o).abs().amax((1, 2)).min() > 0.05
    torch.testing.assert_close(y[0].double(), by_loops(x, tokens[:, 2:3], weights, b_o, 2)[0][0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_a_mask_is_left_to_the_fused_attention(dtype):
    """Stable Diffusion's heads: the formula would write the logits of every query and token out in float32."""
    x, tokens, weights, b_o = inputs(1, 64, 80, 77, 16, 2, 40, dtype)
    bias = torch.zeros(1, 77).masked_fill(torch.arange(77) > 8, -torch.inf)
    with ops.record_impls() as ran:
        y = ops.cross_attention(x, tokens, *weights, b_o, heads=2, token_bias=bias)
    assert ran == [("cross_attention", "sdpa")]
    assert "native: chosen" in ops.explain("cross_attention", x, tokens, *weights, b_o, heads=2), "without a mask"
    expected = by_loops(x, tokens[:, :9], weights, b_o, 2)[0]
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert relative_error(y.double(), expected) < bound


def test_extreme_logits_stay_finite():
    x, tokens, weights, b_o = inputs(1, 4, 8, 6, 4, 2, 4, torch.float32)
    y = ops.cross_attention(1e4 * x, 1e2 * tokens, *weights, b_o, heads=2, impl="reference")
    assert y.isfinite().all()
    torch.testing.assert_close(y.double(), by_loops(1e4 * x, 1e2 * tokens, weights, b_o, 2)[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("impl", ["auto", TRITON, "transposed", "reference"])
@pytest.mark.parametrize("B, L", [(0, 5), (2, 0)])
def test_empty(B, L, impl):
    x, tokens, weights, b_o = inputs(B, L, 8, 3, 4, 2, 4, torch.float32)
    with ops.use_impl(impl):
        assert ops.cross_attention(x, tokens, *weights, b_o, heads=2).shape == (B, L, 8)


def test_half_precision_keeps_the_type_and_computes_in_float32():
    x, tokens, weights, b_o = inputs(2, 16, 32, 5, 8, 4, 8, torch.bfloat16)
    y = ops.cross_attention(x, tokens, *weights, b_o, heads=4, impl="reference")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), by_loops(x, tokens, weights, b_o, 4)[0], rtol=2**-8, atol=2**-9)


def test_gradcheck():
    x, tokens, weights, b_o = inputs(1, 3, 4, 3, 2, 2, 2)
    gamma, beta = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    leaves = [
        t.requires_grad_() for t in (x, tokens, *weights, b_o, gamma, beta, torch.randn(1, 3, dtype=torch.float64))
    ]

    def f(x, tokens, w_q, w_k, w_v, w_o, b_o, gamma, beta, bias):
        return ops.cross_attention(
            x, tokens, w_q, w_k, w_v, w_o, b_o, heads=2, norm_weight=gamma, norm_bias=beta, residual=True,
            token_bias=bias, maps="head", impl="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(heads=3), r"heads 3 must divide the 8 rows of w_q"),
        (dict(x=torch.zeros(2, 4, 7)), r"w_q is \(8, 8\), must be \(8, 7\)"),
        (dict(context=torch.zeros(2, 3, 5)), r"w_k is \(8, 4\), must be \(8, 5\)"),
        (dict(context=torch.zeros(3, 3, 4)), r"x \(2, 4, 8\) and context \(3, 3, 4\)"),
        (dict(context=torch.zeros(2, 3, 4, device="meta")), r"context is on meta, must be on x's device cpu"),
        (dict(token_bias=torch.zeros(2, 4)), r"token_bias is \(2, 4\), must be"),
        (dict(maps="all"), r"maps is 'all', must be"),
        (dict(x=torch.zeros(2, 4, 8).long()), r"x is torch.int64, must be floating point"),
        (dict(norm_weight=torch.ones(8)), r"norm_bias is None, must be \(8,\)"),
        (dict(impl="triton", x=torch.zeros(2, 4, 8).double()), r"impl='triton' cannot serve .*x is torch.float64"),
        (dict(maps="mean", impl="sdpa"), r"impl='sdpa' cannot serve this input: does not return attention maps"),
    ],
)
def test_bad_input(change, message):
    x, context, (w_q, w_k, w_v, w_o), b_o = inputs(2, 4, 8, 3, 4, 2, 4, torch.float32)
    arguments = dict(x=x, context=context, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o, b_o=b_o, heads=2) | change
    with pytest.raises(InputError, match=message):
        ops.cross_attention(**arguments)


@pytest.mark.parametrize(
    "impl, width",
    [
        *(("native", 8), ("transposed", 8), ("sdpa", 8), ("reference", 8)),
        *(pytest.param(*case, marks=pytest.mark.on_gpu) for case in (("triton", 8), ("triton", 5), ("by heads", 5))),
    ],
)
def test_keys_and_values_at_hand(impl, width, monkeypatch):
    """As parts of one wider product of the tokens, as in the U-Net."""
    if impl == "by heads":
        module = sys.modules["encdiff.ops.cross_attention"]  # the package's attribute of that name is the function
        monkeypatch.setattr(module, "choose_route", lambda *sizes: "heads")
        impl = "triton"
    x, tokens, weights, b_o = inputs(2, 7, 16, 5, 4, 2, width, torch.float32)
    bias = None if impl == "native" else torch.randn(2, 5)
    options = dict(heads=2, residual=True, token_bias=bias)
    given = [t.requires_grad_() for t in (x, tokens, *weights, b_o)]
    w_k, w_v = given[3:5]
    exact = [t.detach().double().requires_grad_() for t in given]
    expected = ops.cross_attention(*exact, **options, impl="reference")
    k, _, v = F.linear(tokens, torch.cat([w_k, w_v, w_v])).split(len(w_k), dim=-1)
    actual = ops.cross_attention(x, tokens.detach(), *given[2:], **options, projected=(k, v), impl=impl)
    upstream = torch.randn_like(x)
    gradients = torch.autograd.grad(actual, given, upstream), torch.autograd.grad(expected, exact, upstream.double())
    for mine, theirs in zip((actual, *gradients[0]), (expected, *gradients[1]), strict=True):
        assert relative_error(mine, theirs.detach()) < 2e-6


def test_keys_at_hand_must_fit():
    x, tokens, weights, _ = inputs(2, 7, 16, 5, 4, 2, 8)
    with pytest.raises(InputError, match=r"projected is \(2, 5, 8\), must be \(2, 5, 16\)"):
        ops.cross_attention(x, tokens, *weights, heads=2, projected=torch.zeros(2, 2, 5, 8).unbind())


@pytest.mark.parametrize("given, doubts", [({}, 1), ({"maps": "mean"}, 0), ({"token_bias": torch.zeros(2, 77)}, 0)])
def test_wide_heads_on_a_gpu_are_left_to_pytorch(given, doubts):
    """As measured at Stable Diffusion's sizes, without a mask; who asks for maps gets the kernel."""
    from encdiff.ops.cross_attention import _triton_doubts

    x, context = SimpleNamespace(is_cuda=True, device=torch.device("cuda")), torch.empty(2, 77, 768)
    assert len(_triton_doubts(x, context, torch.empty(320, 320), heads=8, **given)) == doubts
    assert _triton_doubts(x, context, torch.empty(256, 256), heads=8, **given) == []
