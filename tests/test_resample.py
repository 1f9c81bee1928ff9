import re

import pytest
import torch
import torch.nn.functional as F
from _place import interpreted

from encdiff import ops
from encdiff.errors import InputError
from encdiff.models.autoencoder import Upsample
from encdiff.models.unet import ResBlock
from encdiff.ops.resample import resample

pytestmark = pytest.mark.on_gpu

CASES = {
    "paper's first level": ((2, 64, 16, 16), torch.float32, torch.channels_last),
    "paper's narrowest map": ((3, 256, 2, 2), torch.bfloat16, torch.channels_last),
    "two tiles of channels, the second partly empty": ((2, 72, 4, 6), torch.float32, torch.channels_last),
    "odd height": ((2, 8, 5, 4), torch.float32, torch.channels_last),
    "odd width": ((2, 8, 4, 7), torch.float32, torch.channels_last),
    "odd in all": ((3, 67, 3, 5), torch.float32, torch.channels_last),
    "image": ((2, 3, 6, 6), torch.float32, torch.channels_last),
    "one channel": ((2, 1, 4, 4), torch.float32, torch.channels_last),
    "bfloat16": ((2, 24, 4, 6), torch.bfloat16, torch.channels_last),
    "float16": ((2, 24, 4, 6), torch.float16, torch.channels_last),
    "channels first": ((2, 16, 4, 6), torch.float32, torch.contiguous_format),
    "empty batch": ((0, 8, 4, 4), torch.float32, torch.channels_last),
}


def drawn(case, *shape) -> torch.Tensor:
    own, dtype, layout = CASES[case]
    return torch.randn(shape or own).to(dtype).to(memory_format=layout)


def by_hand(x, kind):
    """In float64: sums of slices, or the position that halving a place gives."""
    x = x.double()
    if kind == "up":
        rows, columns = (torch.arange(2 * n) // 2 for n in x.shape[2:])
        return x[:, :, rows][..., columns]
    H, W = (n // 2 * 2 for n in x.shape[2:])
    return sum(x[:, :, i:H:2, j:W:2] for i in (0, 1) for j in (0, 1)) / 4


@pytest.fixture
def nan_memory():
    """Fresh memory holds NaN, so that whatever a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def differ(actual, expected, dtype) -> bool:
    assert actual.shape == expected.shape and actual.dtype == dtype
    # sums of four in float32, then one rounding, instead of which the interpreter cuts bfloat16 off
    bound = 1e-6 + torch.finfo(dtype).eps * expected.abs()
    return bool(((actual.double() - expected).abs() > bound).any())


@pytest.mark.parametrize("impl", ["triton", "native", "reference"])
@pytest.mark.parametrize("kind", ["down", "up"])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, kind, impl, nan_memory):
    x, beside = (drawn(case).requires_grad_() for _ in range(2))
    with ops.record_impls() as ran:
        pair = resample(x, kind, beside=beside, impl=impl)
        alone = resample(x, kind, impl=impl)
    assert ran == [("resample", impl)] * 2
    upstream = [drawn(case, *y.shape) for y in pair]
    gradients = torch.autograd.grad(pair, [x, beside], upstream)
    assert torch.equal(alone, pair[0])
    assert torch.equal(torch.autograd.grad(alone, x, upstream[0])[0], gradients[0])
    for n, t in enumerate((x, beside)):
        leaf = t.detach().double().requires_grad_()
        y = by_hand(leaf, kind)
        assert not differ(pair[n], y, x.dtype), "output"
        assert not differ(gradients[n], torch.autograd.grad(y, leaf, upstream[n].double())[0], x.dtype), "gradient"


@pytest.mark.parametrize("kind", ["down", "up"])
@pytest.mark.parametrize(
    "layout",
    [
        "every other channel",
        "every other column",
        "expanded",
        "misaligned",
        "part of a concatenation",
        "misaligned part",
        "part of an odd concatenation",
    ],
)
def test_any_strides_of_inputs_and_of_upstream_gradients(kind, layout):
    def strided(*shape):
        B, C, H, W = shape

        def wider(channels):
            return torch.randn(B, channels, H, W).to(memory_format=torch.channels_last)

        t = {
            "every other channel": lambda: torch.randn(B, 2 * C, H, W)[:, ::2],
            "every other column": lambda: torch.randn(B, C, H, 2 * W)[..., ::2],
            "part of a concatenation": lambda: wider(C + 16)[:, 8:-8],
            "misaligned part": lambda: wider(C + 16)[:, 3:-13],
            "part of an odd concatenation": lambda: wider(C + 9)[:, :C],
            "expanded": lambda: torch.randn(1, C, 1, W).expand(shape),
            "misaligned": lambda: torch.randn(B * H * W * C + 1)[1:].view(B, H, W, C).permute(0, 3, 1, 2),
        }[layout]()
        assert t.shape == shape
        return t

    x = strided(2, 8, 5, 6)
    before, leaf = x.clone(), x.detach().requires_grad_()
    y = resample(leaf, kind, impl="triton")
    upstream = strided(*y.shape)
    (dx,) = torch.autograd.grad(y, leaf, upstream)
    exact = x.double().requires_grad_()
    expected = by_hand(exact, kind)
    assert not differ(y, expected, x.dtype)
    assert not differ(dx, torch.autograd.grad(expected, exact, upstream.double())[0], x.dtype)
    assert torch.equal(x, before)
    assert y.is_contiguous(memory_format=torch.channels_last) and dx.is_contiguous(memory_format=torch.channels_last)


def test_the_gradient_of_a_part_of_a_concatenation_is_not_copied():
    from encdiff.kernels.resample import _pitched

    dy = torch.randn(2, 24, 4, 4).to(memory_format=torch.channels_last)[:, :16]
    x, pitch = _pitched(dy)
    assert x is dy and pitch == 24
    x, pitch = _pitched(dy[:, 1:9])
    assert torch.equal(x, dy[:, 1:9]) and x.is_contiguous(memory_format=torch.channels_last) and pitch == 8


def test_one_of_a_pair_alone_may_need_gradients():
    x, beside = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 8, 4, 4)
    y, other = resample(x, "down", beside=beside, impl="triton")
    torch.testing.assert_close(torch.autograd.grad(y.sum() + 3 * other.sum(), x)[0], torch.full_like(x, 0.25))
    x, beside = (torch.randn(2, 8, 4, 4, requires_grad=True) for _ in range(2))
    _, other = resample(x, "up", beside=beside, impl="triton")
    dx, dother = torch.autograd.grad(other.sum(), [x, beside], allow_unused=True)
    assert dx is None or not dx.any()
    torch.testing.assert_close(dother, torch.full_like(x, 4.0))


def test_opcheck():
    from encdiff.kernels import resample as kernels

    pair = [torch.randn(2, 8, 5, 4, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(kernels.resample_down, (pair, 0.25))
    torch.library.opcheck(kernels.resample_up, (pair[:1], 11, 8, 1.0))


@pytest.mark.parametrize("kind", ["down", "up"])
def test_compiles_whole_with_a_dynamic_batch(kind):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def run(x):
        return resample(x, kind, beside=2 * x, impl="triton")

    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    for batch in (3, 5, 7):
        x = torch.randn(batch, 8, 4, 6).to(memory_format=torch.channels_last)
        torch.testing.assert_close(compiled(x), resample(x, kind, beside=2 * x, impl="reference"))
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", ["down", "up"])
def test_gradients_of_compiled_code(kind):
    """As autograd traces them ahead of time, on fake tensors."""
    x = torch.randn(2, 8, 5, 4, requires_grad=True)
    upstream = torch.randn_like(resample(x, kind, impl="reference"))
    found = []
    for run in (torch.compile(resample, backend="aot_eager", fullgraph=True), resample):
        y = run(x, kind, impl="triton")
        found.append([y, *torch.autograd.grad(y, x, upstream)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_second_derivatives_are_kernels_too():
    x = torch.randn(1, 2, 3, 5, dtype=torch.float32, requires_grad=True)
    for kind in ("down", "up"):
        found = []
        for impl in ("triton", "reference"):
            y = resample(x, kind, impl=impl)
            (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), x)[0])
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("sample", ["down", "up"])
def test_a_block_resamples_both_its_tensors_at_once(sample):
    block = ResBlock(8, 8, 4, True, 4, sample).to(memory_format=torch.channels_last)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, emb = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last), torch.randn(2, 4)
    with ops.use_impl("triton"), ops.record_impls() as ran:
        y = block(x, emb)
    assert ran.count(("resample", "triton")) == 1
    norm, (scale, shift) = block.in_layers[0], block.emb_layers(emb).chunk(2, 1)
    h = F.silu(F.group_norm(x, 4, norm.weight, norm.bias))
    h, skip = (F.avg_pool2d(t, 2) if sample == "down" else F.interpolate(t, scale_factor=2) for t in (h, x))
    norm, h = block.out_layers[0], block.in_layers[-1](h)
    h = F.group_norm(h, 4, norm.weight, norm.bias) * (1 + scale[..., None, None]) + shift[..., None, None]
    torch.testing.assert_close(y, skip + block.out_layers[-1](F.silu(h)), rtol=1e-4, atol=1e-4)


def test_the_first_stage_doubles_by_the_op():
    layer, x = Upsample(4), torch.randn(1, 4, 3, 5)
    with ops.record_impls() as ran:
        torch.testing.assert_close(layer(x), layer.conv(F.interpolate(x, scale_factor=2.0)))
    assert [op for op, _ in ran] == ["resample"]


@interpreted
def test_dispatch_says_why(monkeypatch):
    x = torch.randn(2, 4, 4, 4)
    says = ops.explain("resample", x, "down", beside=x.double())
    assert "resample: triton: beside is torch.float64, x is torch.float32" in says
    assert "resample: native: chosen" in says
    assert "x is not channels-last" in ops.explain("resample", x, "up")
    assert "channels-last" not in ops.explain("resample", x.to(memory_format=torch.channels_last), "up")
    with pytest.raises(InputError, match="impl='triton' cannot serve .* x is torch.float64"):
        resample(x.double(), "down", impl="triton")
    vast = torch.empty(1, device="meta", dtype=torch.bfloat16).expand(2**13, 1, 2**9, 2**9)
    assert "2^31 positions" in ops.explain("resample", vast, "down")
    assert "2^31" not in ops.explain("resample", vast[: 2**12], "down")
    assert "2^31 positions" in ops.explain("resample", vast[: 2**12], "up")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputError, match="x is on cpu"):
        resample(x, "up", impl="triton")


X = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "sideways"}, "kind is 'sideways', must be 'down' or 'up'"),
        ({"x": X[0]}, "x is (3, 4, 4), must be (B, C, H, W) with H and W at least 2 to go down"),
        ({"x": X[:, :, :1]}, "x is (2, 3, 1, 4), must be (B, C, H, W) with H and W at least 2 to go down"),
        ({"x": X[..., :0], "kind": "up"}, "x is (2, 3, 4, 0), must be (B, C, H, W) with H and W at least 1 to go up"),
        ({"beside": X[:1]}, "beside is (1, 3, 4, 4), must be (2, 3, 4, 4) as x"),
        ({"beside": X.to("meta")}, "beside is on meta, must be on x's device cpu"),
        ({"beside": X.long()}, "beside is torch.int64, must be floating point"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        resample(**{"x": X, "kind": "down"} | arguments)
