import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from encdiff import ops
from encdiff.errors import InputError
from encdiff.ops import _native
from encdiff.ops._attention import layer_norm, merge_heads, split_heads


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
    assert torch.equal(layer_norm(x, gamma, beta, 1e-5)[0], F.layer_norm(x.float(), (8,), gamma, beta).bfloat16())


needs_native = pytest.mark.skipif(_native.load()[0] is not None, reason="the native engine is not built here")
CASES = {  # B, queries, keys, heads, width: blocks of 128 rows, vectors of 16, 8 and 4 lanes, groups of 8 and 4 columns
    "paper": (2, 256, 256, 8, 8),
    "level-2": (2, 64, 64, 8, 16),
    "level-3": (2, 16, 16, 8, 32),
    "odd": (3, 7, 7, 3, 5),
    "one": (1, 1, 1, 1, 1),
    "blocks": (1, 261, 261, 2, 12),
    "widest": (1, 33, 33, 2, 64),
    "tokens": (2, 100, 20, 8, 8),
    "long": (1, 17, 1030, 1, 30),
}
native_cases = pytest.mark.parametrize("case", CASES)
bits = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def draw(case, dtype, logits=1.0):
    """q, k, v and the gradient of what comes out."""
    B, queries, keys, heads, width = CASES[case]
    q, k, v, g = (torch.randn(B, n, heads * width) for n in (queries, keys, keys, queries))
    return [t.to(dtype) for t in (q * logits, k, v, g)], heads


def with_gradients(attend, q, k, v, g):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = attend(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), g)


def forms(heads):
    def plain(q, k, v):
        q, k, v = (split_heads(t, heads) for t in (q, k, v))
        return merge_heads((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v)

    def stock(q, k, v):
        return merge_heads(F.scaled_dot_product_attention(*(split_heads(t, heads) for t in (q, k, v))))

    return plain, stock, lambda q, k, v: torch.ops.encdiff_native.attention(q, k, v, heads)[0]


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@needs_native
@bits
@native_cases
def test_native_is_as_exact_as_the_stock_attention(case, dtype):
    inputs, heads = draw(case, dtype)
    plain, stock, native = forms(heads)
    exact = with_gradients(plain, *(t.double() for t in inputs))
    for ours, theirs, known in zip(*(with_gradients(f, *inputs) for f in (native, stock)), exact, strict=True):
        assert ours.dtype == dtype and ours.shape == known.shape
        if case == "one" and known.norm() == 0:  # one key: nothing depends on the logits
            assert ours.abs().max() < 1e-6
        else:
            assert relative(ours, known) <= max(2 * relative(theirs, known), 1e-7)


@needs_native
@bits
def test_native_with_extreme_logits(dtype):
    """Logits to 1e4 overflow nothing, and the rows of p sum to 1."""
    (q, k, v, g), heads = draw("blocks", dtype, logits=3e3)
    plain, _, native = forms(heads)
    q, k = q.round(), k.round()  # whole numbers: the logits are exact in float32
    exact = with_gradients(plain, *(t.double() for t in (q, k, v, g)))
    assert ((split_heads(q, heads).double() @ split_heads(k, heads).double().mT).abs().max() * 12**-0.5) > 1e4
    tol = {torch.float32: 2e-3, torch.bfloat16: 2e-2}[dtype]  # a logit of 1e4 is known to 1e-3
    ours = with_gradients(native, q, k, v, g)
    assert relative(ours[0], exact[0]) < tol and relative(ours[3], exact[3]) < tol
    assert all(t.isfinite().all() for t in ours)
    torch.testing.assert_close(native(q, k, torch.ones_like(v)), torch.ones_like(q), rtol=1e-6, atol=0)


@needs_native
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_native_keeps_nan_in_its_row(bad):
    (q, k, v, _), heads = draw("odd", torch.float32)
    q[1, 3] = bad
    out = torch.ops.encdiff_native.attention(q, k, v, heads)[0]
    assert out[1, 3].isnan().all() and out.isnan().sum() == q.shape[2]


@needs_native
@bits
def test_native_reads_views_in_place(dtype):
    """A fused projection's thirds, a transposed batch, and a gradient that is spread from one number."""
    B, L, heads, width = 3, 37, 4, 8
    fused = torch.randn(B, L, 3 * heads * width).to(dtype)
    views = fused.chunk(3, -1)
    plain, _, native = forms(heads)
    assert torch.equal(native(*views), native(*(t.contiguous() for t in views)))
    swapped = [t.transpose(0, 1) for t in views]
    assert torch.equal(native(*swapped), native(*(t.contiguous() for t in swapped)))
    leaves = [t.detach().requires_grad_() for t in views]
    torch.testing.assert_close(
        torch.autograd.grad(native(*leaves).sum(), leaves),
        torch.autograd.grad((native(*leaves) * torch.ones(1, dtype=dtype)).sum(), leaves),
    )


@needs_native
def test_native_gives_the_same_bits_on_any_number_of_threads_and_in_any_batch():
    inputs, heads = draw("paper", torch.float32)
    native = forms(heads)[2]
    before = torch.get_num_threads()
    results = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        results.append(with_gradients(native, *inputs))
    torch.set_num_threads(before)
    halves = zip(*(with_gradients(native, *(t[i : i + 1] for t in inputs)) for i in (0, 1)), strict=True)
    for two, one, half in zip(*results, halves, strict=True):
        assert torch.equal(two, one) and torch.equal(one, torch.cat(half))


@needs_native
@bits
def test_native_opcheck(dtype):
    (q, k, v, g), heads = draw("odd", dtype)
    op = torch.ops.encdiff_native.attention
    torch.library.opcheck(op, (q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), heads))
    q, k, v = (t.detach() for t in (q, k, v))
    out, stats = op(q, k, v, heads)
    torch.library.opcheck(torch.ops.encdiff_native.attention_backward, (g, q, k, v, out, stats, heads))


@needs_native
@pytest.mark.parametrize(
    "change, says",
    [
        ({0: torch.zeros(2, 5, 8).double()}, "q must be float32 or bfloat16"),
        ({0: torch.zeros(2, 5)}, "must be .batch, rows, heads x width"),
        ({1: torch.zeros(2, 6, 8).bfloat16()}, "k must be of q's dtype"),
        ({2: torch.zeros(2, 7, 8)}, r"v must be \(2, 6, 8\)"),
        ({2: torch.zeros(2, 8, 6).mT}, "v must be .* contiguous in its last axis"),
        ({3: 3}, "heads x width"),
        ({3: 0}, "heads x width"),
    ],
    ids=["float64", "2-d", "dtypes", "rows", "strides", "heads", "no-heads"],
)
def test_native_op_guards_memory(change, says):
    args = [torch.zeros(2, 5, 8), torch.zeros(2, 6, 8), torch.zeros(2, 6, 8), 2]
    for i, value in change.items():
        args[i] = value
    with pytest.raises(RuntimeError, match=says):
        torch.ops.encdiff_native.attention(*args)


ON_ANOTHER_ISA = """
import sys, torch
from encdiff.ops import _native
_native.load()
inputs, heads, known = torch.load(sys.argv[1])
q, k, v, g = (t.requires_grad_() for t in inputs)
out = torch.ops.encdiff_native.attention(q, k, v, heads)[0]
for ours, theirs in zip((out, *torch.autograd.grad(out, (q, k, v), g)), known, strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
"""


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_native_on_a_lesser_processor(isa, tmp_path):
    inputs, heads = draw("blocks", torch.float32)
    torch.save((inputs, heads, with_gradients(forms(heads)[0], *inputs)), tmp_path / "case.pt")
    command = [sys.executable, "-c", ON_ANOTHER_ISA, str(tmp_path / "case.pt")]
    environment = os.environ | {"ENCDIFF_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@needs_native
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_native_is_chosen_and_its_gradients_reach_every_weight(autocast):
    x = torch.randn(2, 19, 24)
    w, (b_o, gamma, beta) = [t.float() for t in weights(24, 32)], torch.randn(3, 24)
    leaves = [t.requires_grad_() for t in (x, *w, b_o, gamma, beta)]

    def run(impl):
        x, *w, b_o, gamma, beta = leaves
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), ops.record_impls() as ran:
            y = ops.self_attention(x, *w, b_o, heads=4, norm_weight=gamma, norm_bias=beta, residual=True, impl=impl)
        return (y, *torch.autograd.grad(y.square().sum(), leaves)), ran

    ours, ran = run(None)
    assert ran == [("self_attention", "native")]
    for a, b in zip(ours, run("reference")[0], strict=True):
        assert a.dtype == b.dtype and relative(a, b) < (3e-2 if autocast else 1e-5)


@needs_native
def test_native_in_one_graph():
    w = [t.float().requires_grad_() for t in weights(8, 8)]
    compiled = torch.compile(ops.self_attention, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, 8)
    y = ops.self_attention(x, *w, heads=2, impl="native")
    assert torch.equal(compiled(x, *w, heads=2, impl="native"), y)


@needs_native
def test_what_native_cannot_serve_says_why():
    x, w = torch.zeros(2, 4, 8), [t.float() for t in weights(8, 8)]
    wide = [t.float() for t in weights(8, 65)]
    for call, why in [
        (
            lambda: ops.self_attention(x.double(), *weights(8, 8), heads=2, impl="native"),
            "products are in torch.float64",
        ),
        (lambda: ops.self_attention(x, *wide, heads=1, impl="native"), "heads are 65 wide, at most 64"),
        (lambda: ops.self_attention(x[:0], *w, heads=2, impl="native"), "x is empty"),
        (lambda: ops.self_attention(x.to("meta"), *(t.to("meta") for t in w), heads=2, impl="native"), "x is on meta"),
    ]:
        with pytest.raises(InputError, match=why):
            call()
    wide = [t.float() for t in weights(8, 48)]
    assert "native: heads are 48 wide; it pays up to 32" in ops.explain("self_attention", x, *wide, heads=1)


@pytest.mark.parametrize("given", ["norm_weight", "norm_bias"])
def test_half_a_layer_norm_is_refused(given):
    x, w = torch.randn(2, 5, 8), torch.randn(8, 8)
    with pytest.raises(InputError, match="norm_(weight|bias) is None, must be \\(8,\\), or None as the other one"):
        ops.self_attention(x, w, w, w, w, heads=2, **{given: torch.ones(8)})
