import pytest
import torch
from _place import interpreted
from torch import nn

from encdiff import ops
from encdiff.errors import InputError
from encdiff.ops.group_norm import FUSED_CHANNELS, group_norm

pytestmark = pytest.mark.on_gpu

CASES = {  # (B, C, H, W, groups, (scale, shift, SiLU, a bias of x), channels-last)
    "paper's widest level, smallest": (2, 64, 2, 2, 32, (True, True, True), True),
    "16 bytes at a time, part of the columns": (2, 40, 3, 3, 5, (True, True, True), True),
    "16 bytes at a time, several tiles of positions and columns": (1, 72, 2, 129, 9, (True, True, True), True),
    "a group of 12": (2, 48, 3, 5, 4, (True, True, True), True),
    "groups of 6, two tiles of columns": (1, 144, 1, 5, 24, (True, False, True), True),
    "odd everything": (3, 15, 3, 7, 5, (True, True, True), True),
    "several tiles": (1, 6, 17, 16, 3, (True, True, True), True),
    "contiguous": (2, 8, 5, 4, 2, (False, True, True), False),
    "no options": (2, 10, 3, 3, 2, (False, False, False), True),
    "scale alone": (2, 4, 2, 3, 4, (True, False, False), True),
    "layer norm's group": (1, 50, 3, 2, 1, (False, False, True), True),
    "one position": (3, 64, 1, 1, 2, (True, True, True), True),
    "empty batch": (0, 8, 3, 3, 2, (True, True, True), True),
    "a bias of x": (2, 64, 2, 2, 32, (True, True, True, True), True),
    "a bias of x, several tiles of positions and columns": (1, 72, 2, 129, 9, (True, True, True, True), True),
    "a bias of x, contiguous, odd everything": (3, 15, 3, 7, 5, (False, False, True, True), False),
    "a bias of x, several tiles of odd groups": (2, 6, 17, 16, 2, (False, True, False, True), True),
    "a bias of x, empty batch": (0, 8, 3, 3, 2, (True, True, True, True), True),
}


def leaves(B, C, H, W, options, channels_last=True, dtype=torch.float32):
    """[x, weight, bias, scale?, shift?, x_bias?], each of which wants a gradient."""
    x = 2 * torch.randn(B, C, H, W) + 3
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    tensors = [x, torch.randn(C), torch.randn(C), *(torch.randn(B, C) for given in options[:2] if given)]
    return [t.to(dtype).requires_grad_() for t in [*tensors, *(torch.randn(C) for given in options[3:] if given)]]


def named(tensors, has_scale, has_shift, silu, has_x_bias=False):
    """What `leaves` made beside x, weight and bias, by name."""
    names = [
        n for n, given in zip(("scale", "shift", "x_bias"), (has_scale, has_shift, has_x_bias), strict=True) if given
    ]
    return dict(zip(names, tensors[3:], strict=True)) | {"silu": silu}


def run(tensors, groups, options, impl, upstream):
    """[y, gradient of every leaf]."""
    y = group_norm(*tensors[:3], groups, **named(tensors, *options), impl=impl)
    return [y, *torch.autograd.grad(y, tensors, upstream.to(y.dtype))]


def published(tensors, groups, options, upstream):
    """The same by modules and by hand, one group after the other."""
    x, weight, bias, *_ = tensors
    given, parts = named(tensors, *options), []
    x = x + given["x_bias"][:, None, None] if "x_bias" in given else x
    for g in x.split(x.shape[1] // groups, 1):
        d = g - g.mean((1, 2, 3), keepdim=True)
        parts.append(d / (d.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt())
    h = torch.cat(parts, 1) * weight[:, None, None] + bias[:, None, None]
    h = h * (1 + given["scale"][..., None, None]) if "scale" in given else h
    h = h + given["shift"][..., None, None] if "shift" in given else h
    y = nn.SiLU()(h) if given["silu"] else h
    return [y, *torch.autograd.grad(y, tensors, upstream.to(y.dtype))]


def error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def doubles(tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.fixture
def nan_memory():
    """Fresh memory holds NaN, so that whatever a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("impl", ["triton", "centred", "native", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, impl, nan_memory):
    B, C, H, W, groups, options, channels_last = CASES[case]
    tensors, upstream = leaves(B, C, H, W, options, channels_last), torch.randn(B, C, H, W)
    with ops.record_impls() as ran:
        actual = run(tensors, groups, options, impl, upstream)
    assert ran == [("group_norm", impl)]
    exact = published(doubles(tensors), groups, options, upstream)
    stock = published(tensors, groups, options, upstream)
    for a, s, e in zip(actual, stock, exact, strict=True):
        assert a.shape == e.shape and a.dtype == torch.float32
        bound = {"centred": 1e-6, "native": 1e-5}.get(impl, 2 * error(s, e) + 2e-7)  # those sum as PyTorch does
        assert error(a, e) <= bound, (error(a, e), error(s, e))
    if channels_last and B:
        assert actual[0].is_contiguous(memory_format=torch.channels_last)


def test_native_keeps_the_memory_format_where_pytorch_does_not(monkeypatch):
    plain = torch.group_norm
    monkeypatch.setattr(torch, "group_norm", lambda *a: plain(*a).contiguous())  # as on a GPU
    x, weight, bias = torch.randn(2, 4, 3, 3), torch.randn(4), torch.randn(4)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = group_norm(x.contiguous(memory_format=layout), weight, bias, 2, silu=True, impl="native")
        assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("x_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_in_16_bits(dtype, x_bias, nan_memory):
    options = (True, True, True, x_bias)
    tensors, upstream = leaves(2, 12, 3, 5, options, dtype=dtype), torch.randn(2, 12, 3, 5)
    actual = run(tensors, 4, options, "triton", upstream)
    exact = published(doubles(tensors), 4, options, upstream.to(dtype))
    # the interpreter cuts bfloat16 off instead of rounding: up to two units of the last place for each one half
    ulp = torch.finfo(dtype).eps
    for a, s, e in zip(actual, published(tensors, 4, options, upstream), exact, strict=True):
        assert a.dtype == dtype
        assert error(a, e) <= max(2 * error(s, e), ulp), (error(a, e), error(s, e))


def test_triton_reads_mixed_types_and_strides():
    """Features in half precision, parameters and a bias in float32, scale and shift side by side in one tensor."""
    x, x_bias = torch.randn(2, 8, 3, 3).half(), torch.randn(8, requires_grad=True)
    weight, bias, both = torch.randn(8), torch.randn(8), torch.randn(2, 16, requires_grad=True)
    scale, shift = both.chunk(2, 1)
    results = []
    for impl in ("triton", "reference"):
        y = group_norm(x, weight, bias, 4, scale=scale, shift=shift, x_bias=x_bias, impl=impl)
        results.append([y, *torch.autograd.grad((y.float() ** 2).sum(), (both, x_bias))])
    assert results[0][0].dtype == torch.float16 and results[0][1].dtype == torch.float32
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("impl", ["triton", "centred", "reference"])
def test_a_large_mean_does_not_drown_the_variance(impl):
    x = 1000 + torch.randn(1, 4, 16, 17)
    one, zero = torch.ones(4), torch.zeros(4)
    y = group_norm(x, one, zero, 2, impl=impl)
    exact = group_norm(x.double(), one.double(), zero.double(), 2, impl="reference")
    assert error(y, exact) < 1e-3  # an ulp of 1000 is 6e-5; E[x^2] - E[x]^2 would be off by one of 1e6, which is 0.06


def test_triton_passes_on_what_is_not_finite():
    x = torch.randn(2, 6, 3, 3)
    x[0, 2, 1, 1], x[1, 5, 0, 0] = torch.nan, torch.inf
    y = group_norm(x, torch.ones(6), torch.zeros(6), 3, silu=True, impl="triton")
    lost = y.isnan().flatten(2).all(2)
    assert lost.nonzero().tolist() == [[0, 2], [0, 3], [1, 4], [1, 5]]
    assert y.isnan().sum() == 4 * 9


def test_triton_twice_the_same_bits():
    options = (True, True, True, True)
    tensors, upstream = leaves(5, 8, 3, 3, options), torch.randn(5, 8, 3, 3)
    for a, b in zip(*(run(tensors, 4, options, "triton", upstream) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_triton_copies_what_is_not_aligned():
    shapes = (2, 16, 3, 2), (2, 3, 2, 16)
    x, dy = (torch.randn(193)[1:].view(shapes[1]).permute(0, 3, 1, 2) for _ in range(2))
    assert x.data_ptr() % 16 and x.shape == shapes[0]
    weight, bias, results = torch.randn(16), torch.randn(16), []
    for impl in ("triton", "reference"):
        leaf = x.detach().requires_grad_()
        y = group_norm(leaf, weight, bias, 2, silu=True, impl=impl)
        results.append([y, *torch.autograd.grad(y, leaf, dy)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("batch", [1, 130])  # the sum takes 128 rows at a time
def test_triton_sums_over_the_batch(batch):
    tensors, upstream = leaves(batch, 40, 1, 1, (False, False, False)), torch.randn(batch, 40, 1, 1)
    tensors[1] = tensors[1].detach().half().requires_grad_()  # gradients come in each parameter's type
    actual = run(tensors, 5, (False,) * 3, "triton", upstream)
    expected = run(doubles(tensors), 5, (False,) * 3, "reference", upstream.double())
    assert actual[2].dtype == torch.float16 and actual[3].dtype == torch.float32
    for a, e in zip(actual, expected, strict=True):
        assert error(a, e) <= max(1e-6, torch.finfo(a.dtype).eps)


def test_opcheck():
    from encdiff.kernels.group_norm import group_norm as fused
    from encdiff.kernels.group_norm import group_norm_backward

    x, row = torch.randn(2, 3, 4), torch.randn(2, 4)
    weight, bias = torch.randn(4), torch.randn(4)
    wanting = [t.clone().requires_grad_() for t in (x, weight, bias, row)]
    moments = torch.zeros(2, 2), torch.ones(2, 2)
    for x_bias in (None, torch.randn(4, requires_grad=True)):
        torch.library.opcheck(fused, (*wanting, None, x_bias, 2, 1e-5, True))
        x_bias = None if x_bias is None else x_bias.detach()
        torch.library.opcheck(group_norm_backward, (x, x, *moments, weight, bias, row, row, x_bias, 2, True))


@pytest.mark.parametrize("impl", ["centred", "native", "triton"])
def test_compiles_whole_with_a_dynamic_batch(impl):
    norm, graphs = nn.GroupNorm(2, 4), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: group_norm(x, norm.weight, norm.bias, 2, silu=True, impl=impl),
                             backend=backend, fullgraph=True, dynamic=True)  # fmt: skip
    several = [torch.randn(batch, 4, 2, 3) for batch in (5, 7, 9)]
    torch.set_default_device(None)  # under one, torch cannot trace `unflatten`
    for x in several:
        y = compiled(x)
        y.sum().backward()
        torch.testing.assert_close(y, nn.functional.silu(norm(x)))
    assert len(graphs) == 1


@interpreted
def test_dispatch_says_why(monkeypatch):
    x, one = torch.randn(1, 2 * FUSED_CHANNELS + 2, 1, 1), torch.ones(2 * FUSED_CHANNELS + 2)
    assert "group_norm: triton: interpreted on the CPU" in ops.explain("group_norm", x, one, one, len(one))
    assert "group_norm: native: chosen" in ops.explain("group_norm", x, one, one, len(one), with_input=True)
    with pytest.raises(InputError, match="impl='triton' cannot serve .* a group has 65 channels, at most 64"):
        group_norm(x, one, one, 2, impl="triton")
    with pytest.raises(InputError, match="weight is torch.float64, not float32"):
        group_norm(x, one.double(), one, len(one), impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputError, match="x is on cpu"):
        group_norm(x, one, one, len(one), impl="triton")


def test_gate_covers_what_dispatch_can_choose():
    """Each tile, or two of the same code whose groups are narrower and wider."""
    from encdiff.kernels._group_norm_tile import BLOCK_D, Tile
    from encdiff.kernels.group_norm import gate_cases

    assert BLOCK_D[-1] == FUSED_CHANNELS
    gated = {}
    for c in gate_cases():
        if "norm" in c.name:
            rows, columns, group, width, single = (
                c.constexprs[n] for n in ("BLOCK_L", "BLOCK_C", "BLOCK_D", "WIDTH", "SINGLE")
            )
            gated.setdefault((c.kernel, rows, columns, single, width > 0, width == group), set()).add(group)
    kernels = {kernel for kernel, *_ in gated}
    assert len(kernels) == 2
    for channels in range(1, FUSED_CHANNELS + 1):
        for groups in (1, 3, 32):
            for positions in (1, 4, 15, 16, 17, 64, 100, 128, 129, 256, 257, 4096):
                tile = Tile.of(positions, channels * groups, groups)
                code = tile.rows, tile.columns, tile.single, tile.width > 0, tile.width == tile.group
                for kernel in kernels:
                    assert min(gated[kernel, *code]) <= tile.group <= max(gated[kernel, *code])


@pytest.mark.on_cpu
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 4, 3)), r"x is \(2, 4, 3\) of torch.float32, must be \(B, C, H, W\)"),
        (dict(groups=3), "groups 3 must divide the 4 channels of x"),
        (dict(weight=torch.zeros(3)), r"weight is \(3,\), must be \(4,\)"),
        (dict(scale=torch.zeros(4)), r"scale is \(4,\), must be \(2, 4\)"),
        (dict(x_bias=torch.zeros(2, 4)), r"x_bias is \(2, 4\), must be \(4,\)"),
        (dict(x_bias=torch.zeros(4), with_input=True), "with_input is True, must be False where x_bias is given"),
        (dict(shift=torch.zeros(2, 4, device="meta")), "shift is on meta, must be on x's device cpu"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(x=torch.zeros(2, 4, 3, 3), weight=torch.zeros(4), bias=torch.zeros(4), groups=2) | change
    with pytest.raises(InputError, match=message):
        group_norm(**arguments)


@pytest.mark.parametrize("layout", ["whole", "columns of wider rows", "channels first", "none"])
@pytest.mark.parametrize("positions", [(3, 5), (1, 1)], ids=["3x5", "1x1"])
@pytest.mark.parametrize("impl", ["triton", "native"])
def test_the_input_passed_on_brings_its_gradient(layout, positions, impl):
    x = torch.randn(2, 16, *positions).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(16, requires_grad=True), torch.randn(16, requires_grad=True)
    upstream = torch.randn(2, 24, *positions).to(memory_format=torch.channels_last)
    skip = upstream[:, 8:] if layout == "columns of wider rows" else upstream[:, 8:].clone()
    skip = skip.clone(memory_format=torch.contiguous_format) if layout == "channels first" else skip
    y, same = group_norm(x, weight, bias, 4, silu=True, with_input=True, impl=impl)
    expected = group_norm(x, weight, bias, 4, silu=True, impl="reference")
    torch.testing.assert_close(same, x, rtol=0, atol=0)
    outputs, gradients = ([y], [upstream[:, :16]]) if layout == "none" else ([y, same], [upstream[:, :16], skip])
    actual = torch.autograd.grad(outputs, (x, weight, bias), gradients)
    dx, *rest = torch.autograd.grad(expected, (x, weight, bias), upstream[:, :16])
    torch.testing.assert_close(actual, (dx if layout == "none" else dx + skip, *rest), rtol=1e-4, atol=1e-5)


def test_the_input_passed_on_compiles_whole():
    norm, x = nn.GroupNorm(2, 4), torch.randn(3, 4, 2, 3)
    torch.set_default_device(None)  # under one, torch cannot trace `unflatten`

    def f(x):
        y, same = group_norm(x, norm.weight, norm.bias, 2, with_input=True, impl="triton")
        return y.square() + same

    outcomes = []
    for g in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = g(leaf)
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), (leaf, *norm.parameters()))])
    torch.testing.assert_close(*outcomes)
