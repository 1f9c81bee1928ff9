import pytest
import torch
import torch.nn.functional as F
from _place import interpreted

from encdiff import ops
from encdiff.errors import InputError
from encdiff.models.attention import GEGLU
from encdiff.ops.geglu import geglu

pytestmark = pytest.mark.on_gpu

CASES = {
    "paper's narrowest": ((2, 5, 512), torch.float32),
    "odd sizes": ((3, 7, 2 * 37), torch.float32),
    "more than one block of columns": ((3, 2 * 1030), torch.float32),
    "one row": ((2,), torch.float32),
    "bfloat16": ((4, 2 * 24), torch.bfloat16),
    "float16": ((4, 2 * 24), torch.float16),
    "no row": ((0, 8), torch.float32),
    "no column": ((4, 0), torch.float32),
}


def outcome(x, upstream, impl):
    """[y, dx]."""
    x = x.detach().requires_grad_()
    y = geglu(x, impl=impl)
    return [y, *torch.autograd.grad(y, x, upstream.to(y.dtype))]


def by_hand(x, upstream):
    """[y, dx] in float64, both from the formula."""
    (h, g), dy = x.double().chunk(2, -1), upstream.double()
    cdf = torch.special.ndtr(g)
    density = torch.exp(-g.square() / 2) / (2 * torch.pi) ** 0.5
    return [h * g * cdf, torch.cat([dy * g * cdf, dy * h * (cdf + g * density)], -1)]


@pytest.fixture
def nan_memory():
    """Fresh memory holds NaN, so that whatever a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("impl", ["triton", "native", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, impl, nan_memory):
    shape, dtype = CASES[case]
    x = torch.randn(shape).to(dtype)
    upstream = torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    with ops.record_impls() as ran:
        actual = outcome(x, upstream, impl)
    assert ran == [("geglu", impl)]
    # native rounds GELU before the product; the interpreter cuts bfloat16 off instead of rounding
    bound = 2 * torch.finfo(dtype).eps
    for a, e in zip(actual, by_hand(x, upstream), strict=True):
        assert a.shape == e.shape and a.dtype == dtype
        assert (a.double() - e).norm() <= bound * e.norm()


def test_large_gates_pass_or_close():
    g = torch.tensor([-1e4, -12.0, 0.0, 12.0, 1e4])
    x = torch.cat([torch.full_like(g, 3.0), g])
    y, dx = outcome(x, torch.ones(5), "triton")
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 0.0, 36.0, 3e4]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(dx[5:], torch.tensor([0.0, 0.0, 1.5, 3.0, 3.0]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layout", ["transposed", "part of wider rows", "expanded"])
def test_any_strides_and_inputs_are_never_written(layout):
    x = torch.randn(4, 6)
    x = {
        "transposed": x.T.contiguous().T,
        "part of wider rows": torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, :6],
        "expanded": x[:1].expand(4, -1),
    }[layout]
    before, upstream = x.clone(), torch.randn(1, 3).expand(4, 3)
    actual, expected = (outcome(x, upstream, impl) for impl in ("triton", "native"))
    torch.testing.assert_close(actual, expected)
    assert torch.equal(x, before)


def test_opcheck():
    from encdiff.kernels import geglu as kernels

    x = torch.randn(3, 2, 10, requires_grad=True)
    torch.library.opcheck(kernels.geglu, (x,))
    torch.library.opcheck(kernels.geglu_backward, (torch.randn(3, 2, 5), x.detach()))


def test_compiles_whole_with_a_dynamic_batch():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: geglu(x, impl="triton"), backend=backend, fullgraph=True, dynamic=True)
    for batch in (3, 5, 7):
        x = torch.randn(batch, 6)
        torch.testing.assert_close(compiled(x), geglu(x, impl="reference"))
    assert len(graphs) == 1


def test_the_layer_is_the_published_one():
    layer, x = GEGLU(6, 4), torch.randn(2, 3, 6)
    assert [(name, tuple(p.shape)) for name, p in layer.named_parameters()] == [
        ("proj.weight", (8, 6)), ("proj.bias", (8,)),
    ]  # fmt: skip
    h, g = F.linear(x, layer.proj.weight, layer.proj.bias).chunk(2, -1)
    for impl in ("auto", "triton"):
        with ops.use_impl(impl):
            torch.testing.assert_close(layer(x), h * F.gelu(g))


@interpreted
def test_dispatch_says_why(monkeypatch):
    x = torch.randn(2, 4)
    assert "geglu: triton: interpreted on the CPU" in ops.explain("geglu", x)
    assert "geglu: native: chosen" in ops.explain("geglu", x)
    with pytest.raises(InputError, match="impl='triton' cannot serve .* x is torch.float64"):
        geglu(x.double(), impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputError, match="x is on cpu"):
        geglu(x, impl="triton")


@pytest.mark.parametrize("x", [torch.zeros(3, 5), torch.zeros(()), torch.zeros(4, dtype=torch.int64)])
def test_bad_input(x):
    with pytest.raises(InputError, match=r"must be \(\.\.\., 2N\) of floating point"):
        geglu(x)
