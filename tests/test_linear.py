import sys
from contextlib import contextmanager

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from _place import GPU, interpreted
from torch.utils.checkpoint import checkpoint

from encdiff import ops
from encdiff.errors import InputError
from encdiff.models import layers
from encdiff.models.attention import pointwise
from encdiff.ops.linear import _rows, conv2d, linear

pytestmark = pytest.mark.on_gpu
linear_module = sys.modules["encdiff.ops.linear"]  # the package's attribute of that name is the function

LINEAR = {  # x, width of y, dtype
    "matrix": ((30, 16), 32, torch.float32),
    "sequence, odd sizes": ((3, 7, 5), 9, torch.float32),
    "many rows": ((2, 1030, 4), 16, torch.float32),
    "one row": ((6,), 4, torch.float32),
    "bfloat16": ((4, 9, 16), 32, torch.bfloat16),
    "float16": ((4, 9, 16), 32, torch.float16),
    "no row": ((0, 3, 8), 4, torch.float32),
    "no output": ((4, 8), 0, torch.float32),
}
CONV = {  # x, channels of y, side of the kernel, stride, padding, dtype
    "3x3": ((2, 4, 8, 8), 16, 3, 1, 1, torch.float32),
    "odd sizes": ((3, 5, 7, 9), 6, 3, 1, 1, torch.float32),
    "down": ((2, 3, 8, 8), 8, 4, 2, 1, torch.float32),
    "pairs": ((2, 3, 8, 6), 8, 3, (2, 1), (1, 0), torch.float32),
    "pointwise": ((2, 8, 4, 4), 16, 1, 1, 0, torch.float32),
    "one position": ((3, 4, 4, 4), 8, 4, 1, 0, torch.float32),
    "one channel": ((2, 4, 4, 4), 1, 3, 1, 1, torch.float32),
    "bfloat16": ((2, 8, 6, 6), 16, 3, 1, 1, torch.bfloat16),
    "no image": ((0, 4, 6, 6), 8, 3, 1, 1, torch.float32),
}
# of sums of up to a few thousand terms
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


@contextmanager
def recorded():
    """The sums taken by the kernel: as a part of other ops they are in no list of what ran."""
    ran, taken = [], linear_module.bias_gradient
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_module, "bias_gradient", lambda *given: ran.append("column_sum") or taken(*given))
        yield ran


def close(actual, exact, bound):
    for a, e in zip(actual, exact, strict=True):
        assert a.shape == e.shape
        assert (a.double() - e.double()).norm() <= bound * e.double().norm() + 1e-6


def outcome(op, tensors, upstream=None):
    """[y, the gradients] for an upstream gradient, of ones if none is given."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = op(*leaves)
    upstream = torch.ones_like(y) if upstream is None else upstream
    return [y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def draw_linear(case):
    shape, width, dtype = LINEAR[case]
    given = [torch.randn(shape), torch.randn(width, shape[-1]), torch.randn(width)]
    return [t.to(dtype) for t in given], torch.randn(*shape[:-1], width).to(dtype)


def draw_conv(case):
    shape, width, side, stride, padding, dtype = CONV[case]
    given = [torch.randn(shape), torch.randn(width, shape[1], side, side), torch.randn(width)]
    given = [(t.to(memory_format=torch.channels_last) if t.ndim == 4 else t).to(dtype) for t in given]
    y = F.conv2d(*(t.float() for t in given), stride, padding)
    return given, torch.randn_like(y).to(dtype, memory_format=torch.channels_last), (stride, padding)


@pytest.mark.parametrize("case", LINEAR)
def test_linear_against_float64_and_pytorch(case):
    given, upstream = draw_linear(case)
    with recorded() as ran:
        actual = outcome(lambda *t: linear(*t, impl="triton"), given, upstream)
    assert ran == ["column_sum"]
    assert all(a.dtype == given[0].dtype for a in actual)
    exact = outcome(F.linear, [t.double() for t in given], upstream)
    close(actual, exact, BOUNDS[given[0].dtype])
    theirs = outcome(F.linear, given, upstream)
    assert torch.equal(actual[0], theirs[0])
    close(actual, theirs, 2 * BOUNDS[given[0].dtype])


@pytest.mark.parametrize("case", CONV)
def test_conv2d_against_float64_and_pytorch(case):
    given, upstream, geometry = draw_conv(case)
    with recorded() as ran:
        actual = outcome(lambda *t: conv2d(*t, *geometry, impl="triton"), given, upstream)
    assert ran == ["column_sum"]
    assert all(a.dtype == given[0].dtype for a in actual)
    exact = outcome(lambda *t: F.conv2d(*t, *geometry), [t.double() for t in given], upstream)
    close(actual, exact, BOUNDS[given[0].dtype])
    theirs = outcome(lambda *t: F.conv2d(*t, *geometry), given, upstream)
    close(actual, theirs, 2 * BOUNDS[given[0].dtype])
    assert [a.stride() for a in actual[1:]] == [t.stride() for t in theirs[1:]]


def parts(shape, channels_last):
    """An upstream gradient that is a part of a wider one, as of a concatenation."""
    wide = torch.randn(shape[0], 2 * shape[1], *shape[2:])
    return (wide.to(memory_format=torch.channels_last) if channels_last else wide)[:, : shape[1]]


def test_rows_that_lie_apart_are_summed_where_they_are():
    given, _, geometry = draw_conv("3x3")
    shape = F.conv2d(*given, *geometry).shape
    for upstream, fused in ((parts(shape, True), True), (parts(shape, False), False)):
        assert (_rows(upstream) is not None) == fused
        with recorded() as ran:
            actual = outcome(lambda *t: conv2d(*t, *geometry, impl="triton"), given, upstream)
        assert bool(ran) == fused
        close(actual, outcome(lambda *t: F.conv2d(*t, *geometry), given, upstream), 1e-5)
    assert _rows(parts(shape, True)).data_ptr() and _rows(torch.ones(()).expand(2, 3, 4, 4)) is None
    given, upstream = draw_linear("sequence, odd sizes")
    upstream = torch.cat([upstream, torch.full_like(upstream, torch.nan)], -1)[..., : upstream.shape[-1]]
    close(outcome(lambda *t: linear(*t, impl="triton"), given, upstream), outcome(F.linear, given, upstream), 1e-5)


@pytest.mark.parametrize("wanted", range(1, 8))
def test_only_what_is_asked_for(wanted):
    asked = [bool(wanted & 1 << n) for n in range(3)]
    for op, stock, given, upstream in (
        (lambda *t: linear(*t, impl="triton"), F.linear, *draw_linear("matrix")),
        (lambda *t: conv2d(*t, impl="triton"), F.conv2d, *draw_conv("one position")[:2]),
    ):
        leaves = [t.detach().requires_grad_(a) for t, a in zip(given, asked, strict=True)]
        learnt = [t for t in leaves if t.requires_grad]
        with recorded() as ran:
            actual = torch.autograd.grad(op(*leaves), learnt, upstream)
        assert bool(ran) == asked[2]
        close(actual, torch.autograd.grad(stock(*leaves), learnt, upstream), 1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_pointwise_convolution_keeps_its_weights_strides(memory_format):
    conv = layers.Conv2d(8, 4, 1).to(memory_format=memory_format)
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    with ops.use_impl("triton"), recorded() as ran:
        (gradient, _) = torch.autograd.grad(pointwise(x, conv).square().sum(), list(conv.parameters()))
    assert ran == ["column_sum"]
    assert gradient.stride() == conv.weight.stride()


def test_a_layer_used_twice_adds_its_gradients():
    given, _ = draw_linear("matrix")
    square = [given[0], torch.randn(16, 16), torch.randn(16)]
    twice = lambda op: lambda x, w, b: op(op(x, w, b), w, b)  # noqa: E731
    close(outcome(twice(lambda *t: linear(*t, impl="triton")), square), outcome(twice(F.linear), square), 1e-5)


def test_gradients_of_gradients():
    for op, given in ((linear, draw_linear("matrix")[0]), (conv2d, draw_conv("one position")[0])):
        second = []
        for impl in ("triton", "native"):
            leaves = [t.detach().requires_grad_() for t in given]
            first = torch.autograd.grad(op(*leaves, impl=impl).square().sum(), leaves, create_graph=True)
            second.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
        close(*second, 1e-4)


def test_under_autocast_as_pytorch():
    device = torch.get_default_device().type
    for op, stock, given in ((linear, F.linear, draw_linear("matrix")[0]), (conv2d, F.conv2d, draw_conv("3x3")[0])):
        with torch.autocast(device, torch.bfloat16):
            actual, theirs = outcome(lambda *t, op=op: op(*t, impl="triton"), given), outcome(stock, given)
        assert [a.dtype for a in actual] == [torch.bfloat16] + 3 * [torch.float32]
        close(actual, theirs, 2**-6)


def test_with_activation_checkpointing():
    given, upstream = draw_linear("matrix")
    layer = lambda *t: checkpoint(lambda *s: linear(*s, impl="triton"), *t, use_reentrant=False)  # noqa: E731
    close(outcome(layer, given, upstream), outcome(F.linear, given, upstream), 1e-5)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_in_a_cuda_graph():
    given, upstream = draw_linear("many rows")
    step = lambda: outcome(linear, given, upstream)  # noqa: E731
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    given[0].copy_(torch.randn_like(given[0]))
    upstream.copy_(torch.randn_like(upstream))
    graph.replay()
    close(captured, outcome(F.linear, given, upstream), 1e-5)


def test_a_compiler_sees_pytorchs_own():
    names = []

    def backend(graph, inputs):
        names.extend(node.target.__name__ for node in graph.graph.nodes if node.op == "call_function")
        return graph

    layer, conv, x = layers.Linear(4, 8), layers.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 4, 4)
    with ops.use_impl("triton"):
        y = torch.compile(lambda x: layer(conv(x)), backend=backend, fullgraph=True)(x)
        torch.testing.assert_close(y, layer(conv(x)))
    assert names == ["conv2d", "linear"]


@interpreted  # cuDNN's gradients may differ from one call to the next
def test_layers_are_pytorchs_to_the_bit_without_the_kernel():
    for own, stock, x in (
        (layers.Linear(5, 7), nn.Linear(5, 7), torch.randn(3, 5)),
        (layers.Conv2d(3, 7, 3, 2, 1), nn.Conv2d(3, 7, 3, 2, 1), torch.randn(2, 3, 6, 6)),
    ):
        stock.load_state_dict(own.state_dict())
        with ops.use_impl("native"):
            ours = [own(x), *torch.autograd.grad(own(x).sum(), list(own.parameters()))]
        theirs = [stock(x), *torch.autograd.grad(stock(x).sum(), list(stock.parameters()))]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("op, stock", [(linear, F.linear), (conv2d, F.conv2d)])
def test_without_a_bias_or_in_float64(op, stock):
    given = draw_linear("matrix")[0] if op is linear else draw_conv("3x3")[0]
    with ops.use_impl("triton"), recorded() as ran:
        assert torch.equal(op(*given[:2]), stock(*given[:2]))
        outcome(op, [t.double() for t in given])
    assert not ran


@pytest.mark.parametrize("op", ["self_attention", "cross_attention"])
def test_references_take_no_sum_by_the_kernel(op):
    """They are what the kernels are held against."""
    x, w, b = torch.randn(2, 5, 16), torch.randn(16, 16), torch.randn(16, requires_grad=True)
    with ops.use_impl("triton"), recorded() as ran:
        given = [x, *([x] if op == "cross_attention" else []), w, w, w, w, b]
        getattr(ops, op)(*given, heads=2, impl="reference").sum().backward()
    assert not ran and bool((b.grad == 10).all())


def test_bad_input():
    with pytest.raises(InputError, match=r"x is \(3, 4, 4\), must be \(B, I, H, W\)"):
        conv2d(torch.zeros(3, 4, 4), torch.zeros(8, 3, 3, 3))
    x, weight = torch.zeros(4, 16, dtype=torch.bfloat16, requires_grad=True), torch.zeros(32, 16, dtype=torch.bfloat16)
    for impl in ("auto", "triton"):  # the kernel would read past the end of a residual that broadcasts
        with ops.use_impl(impl), pytest.raises(InputError, match=r"residual is \(32,\), must be \(4, 32\)"):
            linear(x, weight, residual=weight[:, 0])
    with pytest.raises(InputError, match="residual is torch.int64"):
        linear(x, weight, residual=torch.zeros(4, 32, dtype=torch.int64))


@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}, {"padding_mode": "reflect", "padding": 1}])
def test_what_the_kernel_does_not_serve_is_pytorchs(options):
    torch.manual_seed(0)
    ours = layers.Conv2d(4, 6, 3, **options)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(ours(x), nn.Conv2d.forward(ours, x), rtol=0, atol=0)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape, width, dtype", [((3, 7, 32), 48, torch.bfloat16), ((70, 64), 64, torch.float16)])
def test_a_residual_is_added_by_the_kernel_that_multiplies(shape, width, dtype, with_bias):
    given = [torch.randn(shape), torch.randn(width, shape[-1]) / 8, torch.randn(width), torch.randn(*shape[:-1], width)]
    x, weight, bias, residual = leaves = [t.to(dtype).requires_grad_() for t in given]
    leaves = leaves if with_bias else [x, weight, residual]
    before, upstream = residual.detach().clone(), torch.randn_like(residual)
    with ops.use_impl("triton"), counted_projections() as ran:
        y = linear(x, weight, bias if with_bias else None, residual=residual)
    assert ran == [1]
    actual = y.detach(), *torch.autograd.grad(y, leaves, upstream)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    biases = exact[2] if with_bias else None
    expected = exact[-1] + F.linear(exact[0], exact[1], biases)
    close(actual, (expected.detach(), *torch.autograd.grad(expected, exact, upstream.double())), BOUNDS[dtype])
    assert torch.equal(residual, before)


def test_where_the_kernel_does_not_serve_a_residual_is_added_after_the_product():
    x, weight, residual = (torch.randn(s, requires_grad=True) for s in ((4, 16), (32, 16), (4, 32)))
    with ops.use_impl("triton"), counted_projections() as ran:
        y = linear(x, weight, residual=residual)  # float32
        assert torch.equal(y, residual + F.linear(x, weight))
        with torch.autocast(x.device.type, torch.bfloat16):
            linear(x, weight, residual=residual)
    assert not ran


@contextmanager
def counted_projections():
    ran, taken = [], linear_module.projection_triton
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_module, "projection_triton", lambda *a, **o: ran.append(1) or taken(*a, **o))
        yield ran
