"""The Triton kernels of self-attention: forward and backward against float64."""

import functools
import json

import pytest
import torch
from _golden import draw, fill, load, relative_error
from _place import DEVICE, GPU, interpreted
from encdiff.kernels import self_attention as kernels
from test_unet import PREFIX, golden_unet
from torch.nn import functional as F

from encdiff import ops
from encdiff.errors import InputError
from encdiff.ops.cross_attention import split_heads

pytestmark = pytest.mark.on_gpu
NAMES = ("x", "w_q", "w_k", "w_v", "w_o", "b_o", "norm_weight", "norm_bias")


def leaves(B, L, C, heads, width, dtype=torch.float32, norm=True) -> dict[str, torch.Tensor]:
    inner = heads * width
    shapes = [(B, L, C), *[(inner, C)] * 3, (C, inner), (C,), (C,), (C,)]
    drawn = [torch.randn(s) / (s[-1] ** 0.5 if len(s) == 2 else 1) for s in shapes[: 8 if norm else 6]]
    return {name: t.to(dtype) for name, t in zip(NAMES, drawn, strict=False)}


def outcome(tensors, op=ops.self_attention, dtype=None, **options) -> dict[str, torch.Tensor]:
    """The output and the gradient of every leaf."""
    tensors = {name: (t if dtype is None else t.to(dtype)).detach().requires_grad_() for name, t in tensors.items()}
    y = op(**tensors, **options)
    upstream = torch.randn(y.shape, generator=torch.Generator(y.device).manual_seed(1)).to(y.dtype)
    return {"y": y.detach()} | dict(zip(tensors, torch.autograd.grad(y, tensors.values(), upstream), strict=True))


def softmax_product(logits, v):
    return torch.einsum("bhij,bhjd->bhid", logits.softmax(-1), v)


def published(x, w_q, w_k, w_v, w_o, b_o, norm_weight=None, norm_bias=None, *, heads, attend=softmax_product):
    """Separate projections, einsum, softmax, in the tensors' own type."""
    h = x if norm_weight is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    q, k, v = (split_heads(F.linear(h, w), heads) for w in (w_q, w_k, w_v))
    logits = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    return x + F.linear(attend(logits, v).transpose(1, 2).flatten(2), w_o, b_o)


class HardwareAttention(torch.autograd.Function):
    """softmax(logits) v, exact but for what the GPU's own instructions add; the backward pass as the kernel's.

    A compiled kernel takes an exponential by ex2.approx.ftz.f32 and a quotient by div.full.f32, each of which may be
    off by 2 units of the last place (PTX ISA; CUDA C++ Programming Guide, mathematical functions): a relative error of
    up to 2 * 2^-23. The stock form's are right to one unit, as are the interpreter's, so twice its error covers them
    there and not here. Three such errors are the kernel's own: of e = 2^(s - top), which p = e / sum(e) and the sums
    inherit; of o = sum(e v) / sum(e); and of p = 2^(s - lse), which the backward pass takes anew. From there they go,
    to first order linearly, through ds = p (dp - sum(do o)) and the products behind it. Each is put at its greatest, up
    or down by chance: an instruction's error depends on the low bits of its argument.
    """

    @staticmethod
    def hardware(exact):
        return exact * (1 + 2 * torch.finfo(torch.float32).eps * torch.randn_like(exact).sign())

    @classmethod
    def forward(cls, ctx, logits, v):
        e = (logits - logits.amax(-1, keepdim=True)).exp()
        approximate = cls.hardware(e)
        z = approximate.sum(-1, keepdim=True)
        o = cls.hardware(approximate @ v / z)
        ctx.save_for_backward(cls.hardware(e / z), v, o)
        return o

    @staticmethod
    def backward(ctx, do):
        p, v, o = ctx.saved_tensors
        return p * (do @ v.mT - (do * o).sum(-1, keepdim=True)), p.mT @ do


def distance(outcome, name, exact):
    return (outcome[name].double() - exact).norm() / exact.norm().clamp_min(1e-30)


def check(actual, stock, expected, hardware=None) -> None:
    """Error at most twice the stock form's in the same type, a rounding of the result, and what `hardware` adds."""
    for name, exact in expected.items():
        error, allowed = (distance(t, name, exact) for t in (actual, stock))
        added = distance(hardware, name, exact) if hardware else 0
        rounding = torch.finfo(actual[name].dtype).eps
        assert error <= 2 * allowed + rounding + added, f"{name}: {error:.2e}, stock {allowed:.2e}, added {added:.2e}"


# (B, L, C, heads, head width), options of `leaves`
CASES = {
    "paper 16x16, two tiles": ((1, 66, 16, 2, 8), {}),
    "paper 8x8": ((1, 64, 16, 1, 16), {"dtype": torch.bfloat16}),
    "paper 2x2": ((3, 4, 64, 2, 32), {"dtype": torch.bfloat16}),
    "odd sizes": ((2, 19, 10, 3, 5), {}),
    "narrowest heads, two positions, no norm": ((2, 2, 6, 1, 4), {"norm": False}),
    "widest heads, float16": ((1, 17, 24, 1, 32), {"dtype": torch.float16}),
    "several tiles of keys and queries, 16 bits": ((1, 257, 8, 1, 8), {"dtype": torch.float16}),
    "sixteen heads": ((1, 5, 16, 16, 8), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case):
    sizes, options = CASES[case]
    tensors, heads = leaves(*sizes, **options), sizes[3]
    with ops.record_impls() as ran:
        actual = outcome(tensors, heads=heads, residual=True, impl="triton")
    assert ran == [("self_attention", "triton")]
    stock, exact = (outcome(tensors, published, dtype, heads=heads) for dtype in (None, torch.float64))
    check(actual, stock, exact, hardware(tensors, heads) if GPU else None)


def hardware(tensors, heads) -> dict[str, torch.Tensor]:
    """In float64, but for the errors of a GPU's instructions."""
    return outcome(tensors, published, torch.float64, heads=heads, attend=HardwareAttention.apply)


def test_golden_unet(monkeypatch):
    """The published U-Net, its self-attention by the kernels, forward and backward: one sample."""
    golden = load("unet_small")
    unet = fill(golden_unet(json.loads(str(golden["config"]))), PREFIX)
    x, tokens, upstream = (
        draw(f"unet_small:{key}", golden[of].shape)[:1]
        for key, of in (("x", "y"), ("context", "grad_context"), ("grad_out", "y"))
    )
    if not GPU:  # few tiles, larger than any GPU has room for: the interpreter's time goes by programs
        monkeypatch.setattr(kernels, "TILES", dict.fromkeys(kernels.TILES, (kernels.Tile(256, 256, 4),)))
    monkeypatch.setattr(ops, "self_attention", functools.partial(ops.self_attention, impl="triton"))
    with ops.record_impls() as ran:
        y = unet(x.requires_grad_(), torch.as_tensor(golden["t"])[:1], tokens)
    y.backward(upstream)
    assert ("self_attention", "triton") in ran
    assert relative_error(y, golden["y"][:1]) < 1e-4
    assert relative_error(x.grad, golden["grad_x"][:1]) < 1e-3


def test_a_single_position_attends_to_itself():
    tensors = leaves(3, 1, 8, 2, 4, norm=False)
    actual = outcome(tensors, heads=2, impl="triton")
    torch.testing.assert_close(actual["y"], tensors["x"] @ tensors["w_v"].T @ tensors["w_o"].T + tensors["b_o"])
    torch.testing.assert_close(actual["w_q"], torch.zeros(8, 8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_extreme_logits(scale):
    tensors = leaves(1, 20, 16, 2, 8, norm=False)
    tensors["x"] *= scale
    y = ops.self_attention(**tensors, heads=2, impl="triton")
    exact = ops.self_attention(**{n: t.double() for n, t in tensors.items()}, heads=2, impl="reference")
    torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-3 * scale)


def test_what_is_not_finite_stays_in_its_sample():
    tensors = leaves(2, 5, 8, 1, 8)
    tensors["x"][0, 3, 2] = torch.nan
    y = ops.self_attention(**tensors, heads=1, impl="triton")
    assert y[0].isnan().all() and y[1].isfinite().all()


@pytest.mark.parametrize("layout", ["transposed", "part of wider rows", "unaligned", "expanded"])
def test_strides(layout):
    """Of the kernel's own input; it is never written."""
    x = torch.randn(2, 19, 48)
    x = {
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "part of wider rows": torch.cat([x, torch.full_like(x, torch.nan)], 2)[..., :48],
        "unaligned": torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape),
        "expanded": x[:1].expand(2, -1, -1),
    }[layout].requires_grad_()
    before, upstream = x.detach().clone(), torch.randn(1, 1, 16).expand(2, 19, 16)
    o, _ = kernels.self_attention(x, 2, 8**-0.5)
    q, k, v = (split_heads(t, 2) for t in x.chunk(3, 2))
    expected = ((q @ k.mT * 8**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, upstream)[0] for y in (o, expected)))
    assert torch.equal(x, before)


def test_every_output_is_written_and_nothing_beyond_is_read(monkeypatch):
    padded = torch.full((2 * 35 * 48 + 128,), torch.nan)
    padded[64:-64] = torch.randn(2 * 35 * 48)
    x, do = padded[64:-64].view(2, 35, 48), torch.randn(2, 35, 16)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(kernels, "TILES", {key: tiles[:1] for key, tiles in kernels.TILES.items()})  # three shares
    o, lse = kernels.self_attention(x, 2, 8**-0.5)
    dx = kernels.self_attention_backward(x, o, lse, do, 2, 8**-0.5)
    exact = x.double().requires_grad_()
    q, k, v = (split_heads(t, 2) for t in exact.chunk(3, 2))
    logits = q @ k.mT * 8**-0.5
    expected = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(o.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1) / torch.log(torch.tensor(2.0)).double())
    torch.testing.assert_close(dx.double(), torch.autograd.grad(expected, exact, do.double())[0], rtol=1e-4, atol=1e-5)


def test_two_runs_are_equal_to_the_bit():
    tensors = leaves(1, 35, 8, 1, 8)
    first, second = (outcome(tensors, heads=1, impl="triton") for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("B, L", [(0, 5), (2, 0)])
def test_empty_has_gradients(B, L):
    gradients = outcome(leaves(B, L, 8, 2, 4), heads=2, impl="triton")
    assert gradients["y"].shape == (B, L, 8)
    assert all((g == 0).all() for g in gradients.values())


def test_library_op():
    qkv = torch.randn(2, 5, 48, requires_grad=True)
    torch.library.opcheck(kernels.self_attention, (qkv, 2, 0.3))
    o, lse = kernels.self_attention(qkv.detach(), 2, 0.3)
    torch.library.opcheck(kernels.self_attention_backward, (qkv.detach(), o, lse, torch.randn_like(o), 2, 0.3))


def test_compiles_whole_with_any_batch():
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    def f(tensors):
        return ops.self_attention(**tensors, heads=2, residual=True, impl="triton")

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for B in (2, 3, 5):
        tensors = leaves(B, 3, 16, 2, 8)
        torch.testing.assert_close(compiled(tensors), f(tensors))
    assert len(graphs) == 1, "the batch must not be compiled in"


def test_autocast_multiplies_in_bfloat16_and_keeps_the_type():
    tensors = leaves(2, 9, 16, 2, 8)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual, stock = (outcome(tensors, **o) for o in (
            dict(heads=2, residual=True, impl="triton"), dict(op=published, heads=2),
        ))  # fmt: skip
    expected = outcome(tensors, published, torch.float64, heads=2)
    check({"y": actual["y"]}, {"y": stock["y"]}, {"y": expected["y"]})
    assert all(t.dtype == torch.float32 for t in actual.values())
    assert not torch.equal(actual["y"], outcome(tensors, heads=2, residual=True, impl="triton")["y"])


@interpreted
def test_dispatch_says_why():
    x, w = torch.zeros(1, 1025, 72), torch.zeros(72, 72)
    explained = ops.explain("self_attention", x[:, :4], *[w] * 4, heads=4)
    assert "self_attention: triton: interpreted on the CPU" in explained
    with pytest.raises(InputError, match="1025 positions must be at most 1024; head width 72 must be at most 32"):
        ops.self_attention(x, *[w] * 4, heads=1, impl="triton")


def test_every_shape_that_is_served_has_a_gated_tile():
    gated = {tuple(c.constexprs[f"BLOCK_{n}"] for n in "LND") for c in kernels.gate_cases()}
    for name in ("fwd", "bwd"):
        for size in (2, 4):
            for width in range(8, 33, 8):
                for positions in (1, 16, 17, 64, 65, 256, 257, 1024):
                    tile = kernels.choose_tile(name, size, width, positions)
                    assert (tile.BLOCK_L, tile.BLOCK_N, kernels.pad_width(width)) in gated
