import pytest
import torch
import torch.nn.functional as F
from _place import interpreted

from encdiff import ops
from encdiff.errors import InputError
from encdiff.models.attention import Conditioning, SpatialTransformer, TransformerBlock, pointwise
from encdiff.ops.projection import projection

pytestmark = pytest.mark.on_gpu

CASES = {  # rows, I, O; LayerNorm, gate, bias, residual
    "behind an attention": ((2, 33), 64, 64, False, False, True, True),
    "queries, keys and values": ((2, 33), 64, 192, True, False, False, False),
    "a feed-forward's first": ((70,), 128, 80, True, True, True, False),
    "its second": ((2, 5), 272, 48, False, False, True, True),
    "the widest rows that are normalised": ((65,), 256, 16, True, False, True, True),
    "everything": ((3, 22), 48, 96, True, True, True, True),
    "nothing": ((3, 2), 16, 32, False, False, False, False),
    "no row": ((0, 3), 16, 32, True, False, True, True),
}
DTYPES = {"triton": (torch.bfloat16, torch.float16), "native": (torch.float32, torch.bfloat16)}


def drawn(case: str, dtype: torch.dtype) -> tuple[dict, dict]:
    """Tensors by name, and options."""
    rows, wide, out, norm, gated, bias, residual = CASES[case]
    tensors = {"x": 1 + 2 * torch.randn(*rows, wide), "weight": torch.randn(out * (1 + gated), wide) * wide**-0.5}
    tensors |= {"bias": torch.randn(len(tensors["weight"]))} if bias else {}
    tensors |= {"norm_weight": 1 + 0.1 * torch.randn(wide), "norm_bias": torch.randn(wide)} if norm else {}
    tensors |= {"residual": torch.randn(*rows, out)} if residual else {}
    return {n: t.to(dtype) for n, t in tensors.items()}, {"gated": gated}


def by_hand(x, weight, bias=None, norm_weight=None, norm_bias=None, residual=None, gated=False):
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    y = F.linear(x, weight, bias)
    if gated:
        h, g = y.chunk(2, -1)
        y = h * g * torch.special.ndtr(g)
    return y if residual is None else y + residual


@pytest.mark.parametrize("impl", ["triton", "native", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, impl):
    for dtype in DTYPES.get(impl, (torch.float32,)):
        tensors, options = drawn(case, dtype)
        kept = {n: t.clone() for n, t in tensors.items()}
        with ops.record_impls() as ran:
            y = projection(**tensors, **options, impl=impl)
        exact = by_hand(**{n: t.double() for n, t in tensors.items()}, **options)
        assert ("projection", impl) in ran and y.dtype == dtype and y.shape == exact.shape
        # the kernel rounds what it normalised and the result, the interpreter cuts bfloat16 off; the others more often
        assert (y.double() - exact).norm() <= {"triton": 2, "native": 4}.get(impl, 4) * torch.finfo(
            dtype
        ).eps * exact.norm()
        assert all(torch.equal(t, kept[n]) for n, t in tensors.items())


@pytest.mark.parametrize("layout", ["transposed", "part of wider rows", "unaligned"])
def test_any_strides(layout):
    tensors, options = drawn("everything", torch.float16)
    expected = projection(**tensors, **options, impl="triton")
    x, weight = tensors["x"], tensors["weight"]
    change = {
        "transposed": lambda t: t.mT.contiguous().mT,
        "part of wider rows": lambda t: torch.cat([t, torch.full_like(t, torch.nan)], -1)[..., : t.shape[-1]],
        "unaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    }[layout]
    tensors |= {"x": change(x), "weight": change(weight), "residual": change(tensors["residual"])}
    assert torch.equal(projection(**tensors, **options, impl="triton"), expected)


def test_opcheck():
    from encdiff.kernels.projection import projection as kernel

    tensors, _ = drawn("everything", torch.float16)
    names = ("x", "weight", "bias", "norm_weight", "norm_bias")
    torch.library.opcheck(kernel, (*(tensors[n] for n in names), 1e-5, True, tensors["residual"]))


def test_gradients_are_those_of_the_single_ops():
    tensors, options = drawn("everything", torch.float64)
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    y, exact = projection(**leaves, **options), by_hand(**leaves, **options)
    upstream = torch.randn_like(exact)
    for mine, theirs in zip(
        *(torch.autograd.grad(z, list(leaves.values()), upstream) for z in (y, exact)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_a_kernel_forced_for_every_op_is_left_out_where_there_are_gradients():
    tensors, options = drawn("everything", torch.bfloat16)
    with ops.use_impl("triton"), ops.record_impls() as ran:
        projection(**tensors, **options)
        assert ran == [("projection", "triton")]
        projection(**tensors | {"x": tensors["x"].requires_grad_()}, **options).sum().backward()
    assert ("projection", "native") in ran
    with pytest.raises(InputError, match="impl='triton' cannot serve this input: a gradient is asked for"):
        projection(**tensors, **options, impl="triton")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feed_forward_layer_is_two_launches_in_half_precision(dtype):
    block = TransformerBlock(32, None, 2, self_attention=False, feedforward=4).to(dtype)
    x = torch.randn(2, 3, 32).to(dtype)
    expected = (x + block.ff(block.norm3(x))).float()
    with ops.use_impl("triton"), ops.record_impls() as ran:
        y = block(x, Conditioning(x))
    fused = dtype == torch.bfloat16
    assert fused == (ran == [("projection", "triton")] * 2) and ("geglu" in dict(ran)) != fused
    assert (y - expected).norm() < (0.03 if fused else 1e-6) * expected.norm()  # the interpreter cuts bfloat16 off
    block.ff.net[2] = torch.nn.Sequential(block.ff.net[2], torch.nn.Tanh())  # as an adapter replaces a layer
    torch.testing.assert_close(block(x, Conditioning(x)), x + block.ff(block.norm3(x)))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pointwise_convolution_with_a_residual(dtype):
    conv = torch.nn.Conv2d(16, 32, 1).to(dtype)
    x, residual = (torch.randn(2, c, 3, 5, dtype=dtype).to(memory_format=torch.channels_last) for c in (16, 32))
    expected = residual + conv(x)
    for impl in ("triton", "auto") if dtype == torch.bfloat16 else ("auto",):
        for shortcut in (residual, residual.contiguous()):
            with ops.use_impl(impl):
                y = pointwise(x, conv, shortcut)
            assert shortcut is not residual or y.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(y, expected, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=0.02)
    torch.testing.assert_close(pointwise(x.contiguous(), conv, residual), expected, atol=0.05, rtol=0.02)


@torch.no_grad()
def test_a_transformer_in_bfloat16_is_near_to_float32_with_its_kernels():
    layer = SpatialTransformer(32, 8, 2, groups=8)
    for p in layer.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    x = torch.randn(2, 32, 4, 4).to(memory_format=torch.channels_last)
    tokens = torch.randn(2, 5, 8)
    exact = layer(x, Conditioning(tokens))
    layer, half = layer.bfloat16(), Conditioning(tokens.bfloat16())
    with ops.use_impl("triton"), ops.record_impls() as ran:
        fused = layer(x.bfloat16(), half)
    assert ran.count(("projection", "triton")) == 3 and not {"geglu", "layer_norm"} & {name for name, _ in ran}
    assert 0 < (fused - exact).norm() < 0.03 * exact.norm()  # the interpreter cuts bfloat16 off


@interpreted
def test_dispatch_says_why():
    x, w = torch.randn(2, 16), torch.randn(32, 16)
    assert "projection: native: chosen" in ops.explain("projection", x, w)
    half = x.bfloat16(), w.bfloat16()
    assert "nothing stands around it" in ops.explain("projection", *half)
    assert "interpreted" in ops.explain("projection", *half, gated=True)
    with pytest.raises(InputError, match="x is torch.float32, not bfloat16 or float16"):
        projection(x, w, impl="triton")
    with pytest.raises(InputError, match="x has 15 columns, not a multiple of 16; y has 31 columns"):
        projection(half[0][:, :15], half[1][:31, :15], impl="triton")
    with torch.autocast("cpu"), pytest.raises(InputError, match="autocast is on"):
        projection(*half, impl="triton")


BAD = {
    "weight is .*, must be \\(O, I\\)": {"weight": torch.ones(32, 15)},
    "weight is .*, must be \\(2 O, I\\)": {"weight": torch.ones(31, 16), "gated": True},
    "bias is .*, must be \\(32,\\)": {"bias": torch.ones(16)},
    "residual is .*, must be \\(2, 32\\)": {"residual": torch.ones(2, 16)},
    "weight is on meta, must be on x's device": {"weight": torch.ones(32, 16, device="meta")},
    "norm_bias is None, must be \\(16,\\)": {"norm_weight": torch.ones(16)},
    "norm_weight is \\(8,\\), must be": {"norm_weight": torch.ones(8), "norm_bias": torch.ones(16)},
    "bias is torch.int64": {"bias": torch.ones(32, dtype=torch.int64)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(InputError, match=message):
        projection(**{"x": torch.ones(2, 16), "weight": torch.ones(32, 16)} | BAD[message])
