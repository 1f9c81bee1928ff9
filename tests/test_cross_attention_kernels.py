"""The Triton kernels of cross-attention: every route, forward and backward, against float64."""

import sys

import pytest
import torch
from _place import DEVICE, interpreted
from encdiff.kernels import cross_attention as kernels
from encdiff.kernels.cross_attention import plan
from torch.nn import functional as F

from encdiff import ops
from encdiff.errors import InputError

pytestmark = pytest.mark.on_gpu
LEAVES = ("x", "context", "w_q", "w_k", "w_v", "w_o", "b_o", "norm_weight", "norm_bias", "token_bias")


def leaves(B, L, C, N, D, heads, width, dtype=torch.float32, norm=True, bias=None) -> dict[str, torch.Tensor]:
    inner = heads * width
    shapes = [(B, L, C), (B, N, D), (inner, C), (inner, D), (inner, D), (C, inner), (C,), (C,), (C,)]
    drawn = {
        name: (torch.randn(shape) / (shape[-1] ** 0.5 if name[0] == "w" else 1)).to(dtype)
        for name, shape in zip(LEAVES, shapes, strict=False)
    }
    if not norm:
        del drawn["norm_weight"], drawn["norm_bias"]
    if bias is not None:
        drawn["token_bias"] = torch.randn((B, N) if bias == "token" else (B, heads, N))
    return drawn


def outcome(tensors, dtype=None, **options) -> dict[str, torch.Tensor]:
    """The output and the gradient of every leaf."""
    tensors = {name: (t if dtype is None else t.to(dtype)).detach().requires_grad_() for name, t in tensors.items()}
    y = ops.cross_attention(**tensors, **options)
    upstream = torch.randn(y.shape, generator=torch.Generator(y.device).manual_seed(1)).to(y.dtype)
    return {"y": y.detach()} | dict(zip(tensors, torch.autograd.grad(y, tensors.values(), upstream), strict=True))


def check(actual, stock, expected) -> None:
    """Error at most twice that of the stock form in the same type, and above a rounding of the result anyway."""
    for name, exact in expected.items():
        scale = exact.norm().clamp_min(1e-30)
        error, allowed = ((t[name].double() - exact).norm() / scale for t in (actual, stock))
        rounding = torch.finfo(actual[name].dtype).eps
        assert error <= 2 * allowed + rounding, f"{name}: {error:.2e}, stock {allowed:.2e}"


@pytest.fixture
def route(monkeypatch):
    """`route(name)` takes the choice from the cost model."""
    module = sys.modules["encdiff.ops.cross_attention"]  # the package's attribute of that name is the function
    return lambda name: monkeypatch.setattr(module, "choose_route", lambda *sizes: name)


# with tokens of which the per-head kernels take all at once, or tiles in turn
ROUTES = pytest.mark.parametrize("name, N", [("folded", 5), ("heads", 5), ("heads", 150)])
# route, (B, L, C, N, D, heads, head width), options of `leaves`
CASES = {
    "folded, paper 16x16": ("folded", (1, 66, 64, 20, 16, 8, 8), {}),
    "folded, odd sizes, bias per token": ("folded", (2, 35, 24, 13, 5, 3, 5), {"bias": "token"}),
    "folded, one head, one token, no norm": ("folded", (2, 5, 8, 1, 3, 1, 4), {"norm": False}),
    "folded, bfloat16, bias per head": ("folded", (2, 33, 16, 20, 8, 3, 8), {"bias": "head", "dtype": torch.bfloat16}),
    "folded, 256 channels in 16 bits": ("folded", (1, 4, 256, 20, 16, 8, 32), {"dtype": torch.float16}),
    "heads, one head": ("heads", (2, 17, 20, 20, 16, 1, 8), {}),
    "heads, odd sizes, bias per head": ("heads", (2, 35, 10, 40, 5, 3, 5), {"bias": "head"}),
    "heads, paper 4x4, bfloat16": ("heads", (2, 16, 64, 20, 16, 2, 32), {"dtype": torch.bfloat16}),
    "heads, paper 2x2, float16, bias per head": (
        "heads",
        (2, 4, 64, 20, 16, 2, 32),
        {"bias": "head", "dtype": torch.float16},
    ),
    "heads, 77 tokens 40 wide, bfloat16": (
        "heads",
        (1, 65, 16, 77, 8, 2, 40),
        {"bias": "token", "dtype": torch.bfloat16},
    ),
    "heads, 154 tokens in turn, bfloat16, bias per head": (
        "heads",
        (2, 17, 16, 154, 8, 2, 40),
        {"bias": "head", "dtype": torch.bfloat16},
    ),
    "heads, 129 tokens in turn, inner wider than C": ("heads", (1, 35, 24, 129, 6, 3, 40), {"bias": "token"}),
    "heads, 64 wide, 40 tokens in turn": ("heads", (1, 18, 8, 40, 5, 1, 64), {"bias": "head"}),
    "heads, 160 wide": ("heads", (1, 3, 8, 128, 4, 1, 160), {"dtype": torch.float16, "norm": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case, route):
    name, sizes, options = CASES[case]
    route(name)
    tensors, heads = leaves(*sizes, **options), sizes[5]
    with ops.record_impls() as ran:
        actual = outcome(tensors, heads=heads, residual=True, impl="triton")
    assert ran == [("cross_attention", "triton")]
    expected = outcome(tensors, torch.float64, heads=heads, residual=True, impl="reference")
    check(actual, stock(tensors, heads), expected)


def stock(tensors, heads) -> dict[str, torch.Tensor]:
    """The published form in the tensors' own type: separate projections, einsum, softmax."""
    tensors = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    get, (C,) = tensors.get, tensors["b_o"].shape
    h = (
        tensors["x"]
        if get("norm_weight") is None
        else F.layer_norm(tensors["x"], (C,), get("norm_weight"), get("norm_bias"))
    )
    sources = ((h, "w_q"), (tensors["context"], "w_k"), (tensors["context"], "w_v"))
    q, k, v = (F.linear(s, tensors[w]).unflatten(-1, (heads, -1)).transpose(1, 2) for s, w in sources)
    logits = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    if get("token_bias") is not None:
        bias = tensors["token_bias"]
        logits = logits + (bias[:, None, None] if bias.ndim == 2 else bias[:, :, None]).to(logits.dtype)
    a = torch.einsum("bhij,bhjd->bhid", logits.softmax(-1), v).transpose(1, 2).flatten(2)
    y = tensors["x"] + F.linear(a, tensors["w_o"], tensors["b_o"])
    upstream = torch.randn(y.shape, generator=torch.Generator(y.device).manual_seed(1)).to(y.dtype)
    return {"y": y.detach()} | dict(zip(tensors, torch.autograd.grad(y, tensors.values(), upstream), strict=True))


@ROUTES
@pytest.mark.parametrize("maps", ["head", "mean"])
def test_maps(name, N, maps, route):
    route(name)
    tensors = leaves(2, 35, 16, N, 5, 2, 8, bias="token")
    tensors["token_bias"][0, 3] = -torch.inf
    actual = ops.cross_attention(**tensors, heads=2, maps=maps, impl="triton")
    expected = ops.cross_attention(**tensors, heads=2, maps=maps, impl="reference")
    torch.testing.assert_close(actual, expected)
    assert (actual[1][0, ..., 3] == 0).all()


@ROUTES
def test_masked_rows_have_a_defined_result(name, N, route):
    route(name)
    tensors = leaves(3, 6, 16, N, 4, 2, 8, bias="token", norm=False)
    tensors["token_bias"][1] = -torch.inf  # all
    tensors["token_bias"][2, 1:] = -torch.inf  # all but one
    actual, expected = (outcome(tensors, heads=2, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual["y"][1], tensors["b_o"].expand(6, 16))
    assert (actual["x"][1] == 0).all()


@ROUTES
def test_extreme_logits(name, N, route):
    route(name)
    tensors = leaves(1, 5, 16, N, 4, 2, 8, norm=False)
    tensors["x"] *= 1e4
    y = ops.cross_attention(**tensors, heads=2, impl="triton")
    exact = ops.cross_attention(**{n: t.double() for n, t in tensors.items()}, heads=2, impl="reference")
    torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["folded", "heads"])
@pytest.mark.parametrize("layout", ["transposed", "part of wider rows", "unaligned", "expanded"])
def test_strides(name, layout, route):
    route(name)
    tensors = leaves(2, 9, 16, 5, 4, 2, 8)
    x = tensors["x"]
    tensors["x"] = {
        "transposed": x.mT.contiguous().mT,
        "part of wider rows": torch.cat([x, torch.full_like(x, torch.nan)], 2)[..., :16],
        "unaligned": torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape),
        "expanded": x[:1].expand(2, -1, -1),
    }[layout]
    before = {n: t.clone() for n, t in tensors.items()}
    actual, expected = (outcome(tensors, heads=2, residual=True, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(tensors, before, rtol=0, atol=0)  # inputs are never written


@ROUTES
def test_every_output_is_written_and_nothing_beyond_is_read(name, N, route, monkeypatch):
    route(name)
    tensors = leaves(2, 9, 24, N, 4, 3, 8, bias="head")
    expected = outcome(tensors, heads=3, residual=True, impl="reference")
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))
    for key, t in tensors.items():  # NaN before and after
        padded = torch.full((t.numel() + 128,), torch.nan)
        padded[64:-64] = t.flatten()
        tensors[key] = padded[64:-64].view(t.shape)
    torch.testing.assert_close(outcome(tensors, heads=3, residual=True, impl="triton"), expected)


@ROUTES
def test_autocast_multiplies_in_bfloat16_and_keeps_the_type(name, N, route):
    route(name)
    tensors = leaves(2, 9, 16, N, 4, 2, 8)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual, published = outcome(tensors, heads=2, residual=True, impl="triton"), stock(tensors, 2)
    expected = outcome(tensors, torch.float64, heads=2, residual=True, impl="reference")
    joint = [{"y": o.pop("y"), "gradients": torch.cat([g.flatten() for g in o.values()])} for o in
             (actual, published, expected)]  # fmt: skip
    check(*joint)
    actual = joint[0]
    assert actual["y"].dtype == actual["gradients"].dtype == torch.float32
    exact = outcome(tensors, heads=2, residual=True, impl="triton")
    assert not torch.equal(actual["y"], exact["y"])


@ROUTES
def test_two_runs_are_equal_to_the_bit(name, N, route):
    route(name)
    tensors = leaves(1, 35, 16, N, 4, 2, 8)
    first, second = (outcome(tensors, heads=2, impl="triton") for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@ROUTES
def test_empty_batch_has_gradients(name, N, route):
    route(name)
    for B, L in ((0, 3), (2, 0)):
        gradients = outcome(leaves(B, L, 16, N, 4, 2, 8, bias="token"), heads=2, impl="triton")
        assert all((g == 0).all() for g in gradients.values())


@ROUTES
def test_tokens_that_lie_apart(name, N, route):
    """A part of wider rows, every other token; and keys and values of two layouts."""
    route(name)
    tensors = leaves(2, 9, 16, N, 4, 2, 8)
    tensors["context"] = torch.randn(2, 2 * N, 9)[:, ::2, 3:7]
    actual, expected = (outcome(tensors, heads=2, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(actual, expected)
    k, v = torch.randn(2, N, 40)[..., 8:24], torch.randn(2, 16, N).mT
    given = {"heads": 2, "projected": (k, v)}
    actual, expected = (ops.cross_attention(**tensors, **given, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(actual, expected)


@ROUTES
def test_library_op(name, N):
    q, k, v = (torch.randn(2, n, 16, requires_grad=True) for n in (5, N, N))
    bias = torch.randn(2, 2, N, requires_grad=True)
    if name == "heads":
        torch.library.opcheck(kernels.cross_attention_heads, (q, k, v, bias, 2, 0.3, True))
        return
    keys, values = (torch.randn(2, 2, N, 16, requires_grad=True) for _ in range(2))
    b_o, gamma, beta = (torch.randn(16, requires_grad=True) for _ in range(3))
    torch.library.opcheck(kernels.cross_attention_folded, (q, keys, values, b_o, gamma, beta, bias, 1e-5, True, "head"))
    torch.library.opcheck(
        kernels.cross_attention_folded, (q, keys, values, None, None, None, None, 1e-5, False, "none")
    )


@ROUTES
def test_compiles_whole_with_any_batch(name, N, route):
    route(name)
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    def f(tensors):
        return ops.cross_attention(**tensors, heads=2, residual=True, impl="triton")

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    several = [leaves(B, 6, 16, N, 4, 2, 8) for B in (2, 3, 5)]
    torch.set_default_device(None)  # under one, torch cannot trace `unflatten`
    for tensors in several:
        torch.testing.assert_close(compiled(tensors), f(tensors))
    assert len(graphs) == 1, "the batch must not be compiled in"


# ---- the cost model


@interpreted
def test_auto_never_interprets_and_says_so():
    tensors = leaves(1, 4, 16, 3, 4, 2, 8)
    with ops.record_impls() as ran:
        ops.cross_attention(**tensors, heads=2)
    assert len(ran) == 1 and ran[0][1] != "triton"
    assert "triton: interpreted on the CPU" in ops.explain("cross_attention", **tensors, heads=2)


def test_more_tokens_than_are_served_or_wider_heads_give_a_reason():
    why = ops.explain("cross_attention", **leaves(1, 4, 16, 1025, 4, 2, 8), heads=2)
    assert "triton: 1025 tokens must be 1 to 1024\n" in why
    for width, dtype in ((80, torch.float32), (264, torch.bfloat16)):
        why = ops.explain("cross_attention", **leaves(1, 4, 20, 77, 4, 2, width, dtype), heads=2)
        assert f"head width {width} must be at most {64 if width == 80 else 256} in {dtype}" in why


@interpreted
def test_without_triton_or_interpreter_the_reason_says_so(monkeypatch):
    monkeypatch.setattr("encdiff.ops._triton._INSTALLED", False)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(InputError, match="triton is not installed; x is on cpu"):
        ops.cross_attention(**leaves(1, 4, 16, 3, 4, 2, 8), heads=2, impl="triton")


@pytest.mark.parametrize(
    "sizes, size, expected",
    [
        ((256, 64, 20, 8), 2, "folded"),  # the paper's 16x16
        ((64, 128, 20, 8), 2, "heads"),
        ((16, 256, 20, 8), 2, "heads"),  # folding 160 columns for 16 queries moves more than it saves
        ((4096, 320, 77, 8), 2, "heads"),  # Stable Diffusion
        ((256, 64, 20, 8), 4, "heads"),  # the padded columns cost more than a launch saves
        ((256, 64, 4, 2), 4, "folded"),
        ((256, 128, 4, 2), 4, "heads"),  # no float32 tile for more than 64 channels
        ((256, 60, 20, 8), 2, "heads"),  # rows not aligned
        ((256, 64, 33, 8), 2, "heads"),
    ],
)
def test_route(sizes, size, expected):
    assert plan.choose_route(*sizes, size) == expected


def test_every_shape_that_is_served_has_a_tile():
    for size in (2, 4):
        for kernel in ("fwd", "dx", "dkv"):
            for channels in range(8, plan.FOLDED_CHANNELS[size] + 1, 8):
                assert (kernel, size == 2, plan.pad(channels, 64)) in plan.FOLDED_TILES
        for kernel in ("fwd", "dq", "dkv"):
            for tokens in (1, 32, 33, 128, 129, plan.MAX_TOKENS):
                for width in range(8, plan.head_width_limit(size) + 1, 8):
                    tile = plan.heads_tile(kernel, 80, tokens, width, size)
                    in_turn = kernel == "dkv" or plan.is_tiled(tokens, width, size)
                    assert in_turn or tokens <= tile.BLOCK_N  # the softmax is taken whole


def test_tiles_of_heads_are_gated_and_no_longer_than_the_papers_queries():
    gated = {
        (*(c.constexprs[f"BLOCK_{n}"] for n in "LND"), c.num_warps) for c in kernels.gate_cases() if " heads " in c.name
    }
    for kernel in ("fwd", "dq", "dkv"):
        for size, widths in ((2, (8, 16, 32, 40, 64, 128, 256)), (4, (8, 32, 64))):
            for width in widths:
                for tokens in (20, 77, 129, 1024):
                    for queries in (4, 16, 17, 256):
                        tile = plan.heads_tile(kernel, queries, tokens, width, size)
                        assert (tile.BLOCK_L, tile.BLOCK_N, plan.pad(width, 32), tile.num_warps) in gated
                        assert tile.BLOCK_L <= 16 or queries > 16 or width > 32 or tokens > 32


def test_predictions_are_the_formula():
    seconds = plan.predict("folded", 64, 128, 20, 8, 2)
    assert seconds == pytest.approx(5e-6 + 128 * 2 * (2 * 64 * 128 + 4 * 8 * 20 * 128) / 4.15e12)
    seconds = plan.predict("folded", 256, 64, 20, 8, 2)
    assert seconds == pytest.approx(5e-6 + 128 * 4 * 256 * 64 * 8 * 32 / 400e12)
    seconds = plan.predict("heads", 4096, 320, 1024, 8, 2)
    assert seconds == pytest.approx(6e-6 + 128 * 4 * 4096 * 320 * (320 + 1024) / 400e12)
