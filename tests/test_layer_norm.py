import pytest
import torch
import torch.nn.functional as F
from _place import DEVICE, GPU, interpreted

from encdiff import ops
from encdiff.errors import InputError
from encdiff.models.attention import Conditioning, TransformerBlock
from encdiff.ops import _attention
from encdiff.ops.layer_norm import FUSED_CHANNELS, layer_norm

pytestmark = pytest.mark.on_gpu

HALF, FULL = torch.bfloat16, torch.float32
CASES = {  # shape, type of x, type of the parameters
    "paper's narrowest": ((2, 70, 64), FULL, FULL),
    "paper's widest": ((3, 5, 256), FULL, FULL),
    "odd sizes": ((3, 7, 37), FULL, FULL),
    "16 bytes at a time, part of the columns": ((2, 9, 72), FULL, FULL),
    "a narrow row": ((131, 5), FULL, FULL),
    "more than 1024 channels": ((3, 1030), FULL, FULL),
    "one channel": ((5, 1), FULL, FULL),
    "one row": ((12,), FULL, FULL),
    "one row of many": ((1, 1, 512), FULL, FULL),
    "bfloat16": ((4, 3, 128), HALF, HALF),
    "bfloat16, odd sizes": ((3, 7, 37), HALF, HALF),
    "bfloat16, parameters in float32": ((4, 3, 64), HALF, FULL),
    "float32, parameters in bfloat16": ((4, 3, 64), FULL, HALF),
    "float16": ((4, 24), torch.float16, torch.float16),
    "no row": ((0, 3, 8), FULL, FULL),
}
NAMES = ("y", "dx", "dweight", "dbias")


def drawn(shape, dtype=FULL, parameters=FULL):
    """[x, weight, bias] and what is given for y; x far from 0, where a variance that is not centred is lost."""
    C = shape[-1]
    leaves = [2 * torch.randn(shape) + 5, 1 + 0.3 * torch.randn(C), torch.randn(C)]
    types = (dtype, parameters, parameters)
    return [t.to(d) for t, d in zip(leaves, types, strict=True)], torch.randn(shape).to(dtype)


def outcome(tensors, upstream, impl, eps=1e-5):
    """[y, dx, dweight, dbias]."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = layer_norm(*leaves, eps, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def by_hand(tensors, upstream, eps=1e-5):
    """The same in float64, gradients from the formula."""
    x, w, b = (t.double() for t in tensors)
    dy, over = upstream.double(), tuple(range(x.ndim - 1))
    d = x - x.mean(-1, keepdim=True)
    rstd = (d.square().mean(-1, keepdim=True) + eps) ** -0.5
    h, g = d * rstd, dy * w
    dx = rstd * (g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True))
    sums = [(t.sum(over) if over else t) for t in (dy * h, dy)]
    return [h * w + b, dx, *sums]


def relative(a, e):
    return ((a.double() - e).norm() / e.norm().clamp_min(1e-30)).item()


@pytest.fixture
def nan_memory():
    """Fresh memory holds NaN, so that whatever a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("impl", ["triton", "native", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, impl, nan_memory):
    shape, dtype, parameters = CASES[case]
    tensors, upstream = drawn(shape, dtype, parameters)
    with ops.record_impls() as ran:
        actual = outcome(tensors, upstream, impl)
    assert ran == [("layer_norm", impl)]
    for name, a, e, like in zip(NAMES, actual, by_hand(tensors, upstream), (tensors[0], *tensors), strict=True):
        assert a.shape == like.shape and a.dtype == like.dtype
        if shape[-1] == 1 and name in ("dx", "dweight"):
            # zero, but for rounding: a GPU subtracts dy w from its exact product, and 1/sqrt(eps) multiplies the rest
            left = torch.finfo(FULL).eps * (tensors[1] * upstream).abs().max() * 1e-5**-0.5
            assert a.abs().max() <= (1e-3 if impl == "native" else left)
            continue
        # PyTorch rounds the parameters' gradients to x's type, the interpreter cuts bfloat16 off instead of rounding
        rounded = max(torch.finfo(d).eps for d in (a.dtype, dtype if impl == "native" else a.dtype))
        bound = 2 * rounded if rounded > 1e-5 else 4e-6  # sums in float32 of numbers about 5
        assert relative(a, e) <= bound, (name, relative(a, e))


def test_programs_that_take_several_tiles(monkeypatch):
    from encdiff.kernels import layer_norm as kernels

    tensors, upstream = drawn((83, 1000))  # 21 tiles
    for programs in (1, 4):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        actual = outcome(tensors, upstream, "triton")
        assert max(map(relative, actual, by_hand(tensors, upstream))) < 2e-6


@pytest.mark.skipif(not GPU, reason="more than the interpreter can do in a test")
def test_every_program_on_the_gpu_takes_several_tiles():
    tensors, upstream = drawn((40000, 64), HALF, HALF)
    first, again = (outcome(tensors, upstream, "triton") for _ in range(2))
    assert all(map(torch.equal, first, again))
    assert max(map(relative, first, by_hand(tensors, upstream))) < 4e-3


@pytest.mark.parametrize("layout", ["transposed", "part of wider rows", "expanded", "not from 16 bytes on"])
def test_any_strides_and_inputs_are_never_written(layout):
    (x, weight, bias), _ = drawn((4, 6, 8))
    x = {
        "transposed": x.mT.contiguous().mT,
        "part of wider rows": torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., :8],
        "expanded": x[:1, :1].expand(4, 6, -1),
        "not from 16 bytes on": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(4, 6, 8),
    }[layout]
    wide = torch.randn(16)
    tensors = [x, wide[::2], wide[1::2] if layout == "transposed" else torch.cat([bias[:1], bias])[1:]]
    before = [t.clone() for t in tensors]
    upstream = torch.randn(4, 8, 6).mT if layout != "expanded" else torch.randn(4, 1, 8).expand(4, 6, 8)
    actual, expected = outcome(tensors, upstream, "triton"), by_hand(tensors, upstream)
    assert max(map(relative, actual, expected)) < 4e-6
    assert all(map(torch.equal, tensors, before))


def test_no_gradient_comes_back_where_none_is_asked_for():
    from encdiff.kernels import layer_norm as kernels

    (x, weight, bias), upstream = drawn((3, 8))
    x.requires_grad_()
    (dx,) = torch.autograd.grad(layer_norm(x, weight, bias, impl="triton"), x, upstream)
    assert relative(dx, by_hand([x.detach(), weight, bias], upstream)[1]) < 4e-6
    y, mean, rstd = kernels.layer_norm(x, weight, bias, 1e-5)
    assert not mean.requires_grad and not rstd.requires_grad
    assert kernels._autograd(None, None, None, None) == (None,) * 4
    torch.testing.assert_close(mean, x.mean(-1).detach())
    torch.testing.assert_close(rstd, (x.var(-1, correction=0) + 1e-5).rsqrt().detach())


def test_eps_counts_where_a_row_is_constant():
    x, one = torch.full((2, 8), 3.0), torch.ones(8)
    dx = outcome([x, one, one], torch.eye(8)[:2], "triton", eps=0.25)[1]
    torch.testing.assert_close(dx, 2 * (torch.eye(8)[:2] - 1 / 8))


@pytest.mark.parametrize("layout", ["whole", "transposed", "none"])
@pytest.mark.parametrize("shape, dtype", [((3, 7, 37), FULL), ((4, 3, 128), HALF), ((0, 3, 8), FULL)])
def test_the_input_passed_on_brings_its_gradient(shape, dtype, layout):
    """y and x once more: what comes back through x is added by the kernel."""
    tensors, upstream = drawn(shape, dtype, dtype)
    again = torch.randn(shape).to(dtype)
    again = again.mT.contiguous().mT if layout == "transposed" else again
    leaves = [t.detach().requires_grad_() for t in tensors]
    y, x = layer_norm(*leaves, with_input=True, impl="triton")
    through = [y] if layout == "none" else [y, x]
    actual = torch.autograd.grad(through, leaves, [upstream, again][: len(through)])
    expected = by_hand(tensors, upstream)
    expected[1] = expected[1] + (0 if layout == "none" else again.double())
    assert torch.equal(x, tensors[0]) and relative(y.detach(), expected[0]) <= 2 * torch.finfo(dtype).eps + 4e-6
    for a, e in zip(actual, expected[1:], strict=True):
        assert a.dtype == dtype and relative(a, e) <= (2 * torch.finfo(dtype).eps if dtype == HALF else 4e-6)


def test_without_a_gradient_the_input_is_passed_on_as_it_is():
    (x, weight, bias), _ = drawn((3, 8))
    assert layer_norm(x, weight, bias, with_input=True, impl="triton")[1] is x
    leaf = x.clone().requires_grad_()
    assert layer_norm(leaf, weight, bias, with_input=True, impl="native")[1] is leaf


def test_opcheck():
    from encdiff.kernels import layer_norm as kernels

    (x, weight, bias), upstream = drawn((3, 2, 10))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(kernels.layer_norm, (*leaves, 1e-5))
    x, weight, bias = (t.detach() for t in leaves)
    _, mean, rstd = kernels.layer_norm(x, weight, bias, 1e-5)
    torch.library.opcheck(kernels.layer_norm_backward, (upstream, x, mean, rstd, weight))
    torch.library.opcheck(kernels.layer_norm_backward, (upstream, x, mean, rstd, weight, upstream))


def test_compiles_whole_with_a_dynamic_batch():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    (_, weight, bias), _ = drawn((6,))
    compiled = torch.compile(lambda x: layer_norm(x, weight, bias, impl="triton"), backend=backend, fullgraph=True,
                             dynamic=True)  # fmt: skip
    for batch in (3, 5, 7):
        x = torch.randn(batch, 6)
        torch.testing.assert_close(compiled(x), layer_norm(x, weight, bias, impl="reference"))
    assert len(graphs) == 1


def test_a_compiled_graph_holds_pytorchs_own():
    held = []

    def backend(graph, inputs):
        held.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    (x, weight, bias), _ = drawn((3, 6))
    torch.compile(lambda x: layer_norm(x, weight, bias), backend=backend, fullgraph=True)(x)
    assert any("layer_norm" in name for name in held) and not any("encdiff" in name for name in held)


def test_attention_begins_with_the_same():
    """Fused where forced or on a GPU, not recorded, and no error where it cannot serve."""
    (x, weight, bias), _ = drawn((2, 5, 8), HALF, FULL)
    expected = F.layer_norm(x.float(), (8,), weight, bias).bfloat16()
    if not GPU:
        assert torch.equal(_attention.layer_norm(x, weight, bias, 1e-5)[0], expected)
    with ops.use_impl("triton"), ops.record_impls() as ran:
        y, _ = _attention.layer_norm(x, weight, bias, 1e-5)
        double = _attention.layer_norm(x.double(), weight.double(), bias.double(), 1e-5)[0]
    assert ran == [] and y.dtype == HALF and double.dtype == torch.float64
    assert relative(y, by_hand((x, weight, bias), x)[0]) < 8e-3
    assert relative(double, by_hand((x, weight, bias), x)[0]) < 1e-12
    assert _attention.layer_norm(x, None, None, 1e-5)[0] is x


def test_the_feed_forward_of_the_model_is_normalised_by_it():
    block, x = TransformerBlock(8, None, 2, False, 4).to(DEVICE), torch.randn(2, 3, 8)
    expected = x + block.ff(block.norm3(x))
    for impl in ("auto", "triton"):
        with ops.use_impl(impl), ops.record_impls() as ran:
            y = block(x, Conditioning(x))
        assert ("layer_norm", "triton" if GPU or impl == "triton" else "native") in ran
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parameters", [FULL, HALF])
@pytest.mark.on_cpu
def test_on_a_cpu_it_is_what_it_was(parameters):
    tensors, upstream = drawn((5, 7, 24), HALF, parameters)
    leaves = [t.requires_grad_() for t in tensors]
    y = F.layer_norm(leaves[0], (24,), *leaves[1:])
    actual = outcome(tensors, upstream, None)
    assert all(map(torch.equal, actual, [y, *torch.autograd.grad(y, leaves, upstream)]))


@interpreted
def test_dispatch_says_why(monkeypatch):
    (x, weight, bias), _ = drawn((2, 4))
    assert "layer_norm: triton: interpreted on the CPU" in ops.explain("layer_norm", x, weight, bias)
    assert "layer_norm: native: chosen" in ops.explain("layer_norm", x, weight, bias)
    with pytest.raises(InputError, match="impl='triton' cannot serve .* x is torch.float64"):
        layer_norm(x.double(), weight, bias, impl="triton")
    wide = torch.zeros(FUSED_CHANNELS + 1)
    with pytest.raises(InputError, match="x has 4097 channels, at most 4096"):
        layer_norm(wide, wide, wide, impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputError, match="x is on cpu"):
        layer_norm(x, weight, bias, impl="triton")


def test_bad_input():
    for x in (torch.zeros(()), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(InputError, match=r"must be \(\.\.\., C\) of floating point"):
            layer_norm(x, torch.zeros(4), torch.zeros(4))
    with pytest.raises(InputError, match=r"bias is \(3,\), must be \(4,\) for x \(2, 4\)"):
        layer_norm(torch.zeros(2, 4), torch.zeros(4), torch.zeros(3))
    with pytest.raises(InputError, match="weight is on meta, must be on x's device"):
        layer_norm(torch.zeros(2, 4), torch.zeros(4, device="meta"), torch.zeros(4))
