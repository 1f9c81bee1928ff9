import pytest
import torch
from _place import DEVICE, GPU, interpreted
from torch import nn

from encdiff import ops
from encdiff.errors import InputError
from encdiff.models.layers import Conv2d
from encdiff.ops._beside import Beside, Sink, give
from encdiff.ops.residual_add import residual_add, sum_takes_bias

pytestmark = pytest.mark.on_gpu

CASES = {  # (B, C, H, W), channels-last
    "several tiles": ((2, 128, 5, 7), True),
    "odd everything": ((3, 67, 3, 5), True),
    "contiguous": ((2, 8, 5, 4), False),
    "one position": ((3, 64, 1, 1), True),
    "one channel": ((2, 1, 3, 3), True),
    "empty batch": ((0, 8, 3, 3), True),
}
LIMITS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def leaves(shape, channels_last=True, dtype=torch.float32):
    """[x, h, bias], each of which wants a gradient."""
    order = torch.channels_last if channels_last else torch.contiguous_format
    maps = [torch.randn(shape).to(dtype, memory_format=order) for _ in range(2)]
    return [t.requires_grad_() for t in (*maps, torch.randn(shape[1]).to(dtype))]


def run(tensors, impl, upstream):
    y = residual_add(*tensors, impl=impl)
    return [y, *torch.autograd.grad(y, tensors, upstream.to(y.dtype))]


def exact(tensors, upstream):
    x, h, bias = (t.detach().double() for t in tensors)
    upstream = upstream.to(tensors[0].dtype).double()
    return [x + h + bias.view(1, -1, 1, 1), upstream, upstream, upstream.sum((0, 2, 3))]


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("impl", ["triton", "native", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, impl):
    shape, channels_last = CASES[case]
    tensors, upstream = leaves(shape, channels_last), torch.randn(shape)
    with ops.record_impls() as ran:
        actual = run(tensors, impl, upstream)
    assert ran == [("residual_add", impl)]
    for a, e in zip(actual, exact(tensors, upstream), strict=True):
        assert a.shape == e.shape and a.dtype == torch.float32 and error(a, e) <= LIMITS[a.dtype]
    assert not (channels_last and shape[0]) or actual[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bias", [torch.float32, None], ids=["float32 bias", "its own type"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_in_16_bits(dtype, bias):
    tensors, upstream = leaves((2, 48, 3, 5), dtype=dtype), torch.randn(2, 48, 3, 5)
    tensors[2] = tensors[2].detach().to(bias or dtype).requires_grad_()
    actual = run(tensors, "triton", upstream)
    for a, t, e in zip(actual, (tensors[0], *tensors), exact(tensors, upstream), strict=True):
        assert a.dtype == t.dtype and error(a, e) <= LIMITS[dtype]


@pytest.mark.parametrize("layout", ["columns of wider rows", "channels first"])
def test_an_upstream_gradient_in_another_layout(layout):
    tensors, wide = leaves((2, 16, 3, 5)), torch.randn(2, 24, 3, 5).to(memory_format=torch.channels_last)
    upstream = wide[:, 8:] if layout == "columns of wider rows" else wide[:, 8:].contiguous()
    for a, e in zip(run(tensors, "triton", upstream), exact(tensors, upstream), strict=True):
        assert error(a, e) <= LIMITS[a.dtype]


def test_only_what_asks_for_a_gradient_gets_one():
    x, h, bias = (t.detach() for t in leaves((2, 16, 3, 3)))
    assert not residual_add(x, h, bias, impl="triton").requires_grad
    y = residual_add(x, h.requires_grad_(), bias, impl="triton")
    torch.testing.assert_close(torch.autograd.grad(y.sum(), h)[0], torch.ones_like(h))
    y = residual_add(x, h.detach(), bias.requires_grad_(), impl="triton")
    torch.testing.assert_close(torch.autograd.grad(y.sum(), bias)[0], torch.full_like(bias, 2 * 9))


def test_the_gradient_of_a_bias_goes_to_its_sink():
    tensors, upstream = leaves((2, 16, 3, 3)), torch.randn(2, 16, 3, 3)
    beside, place = Beside(torch.device(DEVICE) if GPU else None), torch.full((16,), torch.nan, device=DEVICE)
    give(tensors[2], Sink(beside, place))
    for times in (1, 2):
        residual_add(*tensors, impl="triton").backward(upstream)
        beside.join()
        assert tensors[2].grad is None
        torch.testing.assert_close(place, times * upstream.sum((0, 2, 3)))
    torch.testing.assert_close(tensors[0].grad, 2 * upstream)
    with torch.autocast(DEVICE, torch.bfloat16):  # where sinks do not serve
        residual_add(*tensors, impl="triton").backward(upstream)
    torch.testing.assert_close(tensors[2].grad, upstream.sum((0, 2, 3)))


def test_compiles_whole():
    tensors, upstream, results = leaves((3, 16, 2, 3)), torch.randn(3, 16, 2, 3), []
    torch.set_default_device(None)  # under one, torch cannot trace `unflatten`
    plain = lambda x, h, bias: residual_add(x, h, bias, impl="triton").square()  # noqa: E731
    for f in (plain, torch.compile(plain, backend="aot_eager", fullgraph=True)):
        y = f(*tensors)
        results.append([y, *torch.autograd.grad(y, tensors, upstream)])
    torch.testing.assert_close(*results)


def test_opcheck():
    from encdiff.kernels.residual_add import residual_add as fused

    x, h, bias = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(4)
    torch.library.opcheck(fused, tuple(t.requires_grad_() for t in (x, h, bias)))


@interpreted
def test_dispatch_says_why(monkeypatch):
    x, h, bias = leaves((1, 4, 3, 3))
    assert "residual_add: triton: interpreted on the CPU" in ops.explain("residual_add", x, h, bias)
    contiguous = x.contiguous(memory_format=torch.contiguous_format)
    assert "x or h is not channels-last" in ops.explain("residual_add", contiguous, h, bias)
    with pytest.raises(InputError, match="x and h are torch.float32 and torch.float16"):
        residual_add(x, h.half(), bias, impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputError, match="x is on cpu"):
        residual_add(x, h, bias, impl="triton")


@pytest.mark.on_cpu
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 4, 3)), r"x is \(2, 4, 3\) of torch.float32, must be \(B, C, H, W\)"),
        (dict(h=torch.zeros(2, 4, 3, 2)), r"h is \(2, 4, 3, 2\), must be \(2, 4, 3, 3\)"),
        (dict(bias=torch.zeros(3)), r"bias is \(3,\), must be \(4,\) for x"),
        (dict(bias=torch.zeros(4, device="meta")), "bias is on meta, must be on x's device cpu"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(x=torch.zeros(2, 4, 3, 3), h=torch.zeros(2, 4, 3, 3), bias=torch.zeros(4)) | change
    with pytest.raises(InputError, match=message):
        residual_add(**arguments)


def test_who_asks_first_leaves_a_bias_only_to_the_kernel():
    x, _, bias = leaves((2, 16, 3, 3))
    with ops.use_impl("triton"):
        assert sum_takes_bias(x, bias) and not sum_takes_bias(x.double(), bias)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert not sum_takes_bias(x, bias)  # the convolution's output is narrower than x
        asked = []
        torch.func.grad(lambda b: (asked.append(sum_takes_bias(x, b)), b.sum())[1])(bias.detach())
        assert asked == [False]
    for impl in ("native", "reference"):
        with ops.use_impl(impl):
            assert not sum_takes_bias(x, bias)
    conv = Conv2d(4, 8, 3, padding=1)
    torch.testing.assert_close(
        conv(x[:, :4], with_bias=False) + conv.bias[:, None, None],
        nn.functional.conv2d(x[:, :4], *conv.parameters(), padding=1),
    )
