import pytest
import torch
from _place import interpreted

from encdiff import ops
from encdiff.errors import InputError
from encdiff.ops.column_sum import column_sum, is_fused

pytestmark = pytest.mark.on_gpu

CASES = {
    "one program for 16 columns": ((300, 48), torch.float32),
    "odd sizes": ((77, 37), torch.float32),
    "every row of one launch": ((2048, 16), torch.float32),
    "shares": ((2049, 64), torch.float32),
    "shares, odd sizes": ((2500, 67), torch.float32),
    "shares of few columns": ((5000, 3), torch.float32),
    "shares of several tiles": ((70000, 130), torch.bfloat16),
    "one row": ((1, 20), torch.float32),
    "one column": ((130, 1), torch.float32),
    "bfloat16": ((200, 32), torch.bfloat16),
    "float16": ((2100, 24), torch.float16),
    "no row": ((0, 8), torch.float32),
    "no column": ((8, 0), torch.float32),
}


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
    with ops.record_impls() as ran:
        y = column_sum(x, impl=impl)
    assert ran == [("column_sum", impl)]
    assert y.shape == shape[1:] and y.dtype == dtype
    exact, size = x.double().sum(0), x.double().norm()
    # of the result, which the interpreter cuts off instead of rounding, and of so many sums in float32
    bound = torch.finfo(dtype).eps * exact.norm() + torch.finfo(torch.float32).eps * len(x) ** 0.5 * size
    assert (y.double() - exact).norm() <= bound


@pytest.mark.parametrize("impl", ["triton", "native", "reference"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [100, 3000])
def test_any_dtype_of_the_result(rows, wanted, given, impl):
    x = torch.ones(rows, 16, dtype=given)
    y = column_sum(x, wanted, impl=impl)  # in bfloat16 a running sum would stop at 256
    assert y.dtype == wanted
    torch.testing.assert_close(y.double(), torch.full((16,), float(rows)).double(), rtol=2**-7, atol=0)
    assert wanted == torch.bfloat16 or bool((y == rows).all())


def test_sums_are_taken_in_float32():
    x = torch.full((4096, 16), 1.0).bfloat16()
    x[0] = 2.0**-9
    assert bool((column_sum(x, torch.float32, impl="triton") == 4095 + 2.0**-9).all())


@pytest.mark.parametrize("rows", [40, 2200])
@pytest.mark.parametrize("layout", ["transposed", "part of wider rows", "unaligned", "expanded", "expanded rows"])
def test_any_strides_and_inputs_are_never_written(layout, rows):
    x = torch.randn(rows, 32)
    x = {
        "transposed": x.T.contiguous().T,
        "part of wider rows": torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, :32],
        "unaligned": torch.cat([torch.full((rows, 1), torch.nan), x], 1)[:, 1:],
        "expanded": x[:1, :1].expand(rows, 32),
        "expanded rows": x[:1].expand(rows, 32),
    }[layout]
    before = x.clone()
    torch.testing.assert_close(column_sum(x, impl="triton"), x.double().sum(0).float(), rtol=1e-5, atol=2e-5)
    assert torch.equal(x, before)


def test_the_same_bits_every_time():
    x = torch.randn(9000, 70)
    first = column_sum(x, impl="triton")
    assert torch.equal(first, column_sum(x.clone(), impl="triton"))


def test_so_many_columns_that_one_launch_sums_more_rows():
    from encdiff.kernels import column_sum as kernels

    assert kernels.shares(2048, 64) == 1 and kernels.shares(32768, 64) == 256 and kernels.shares(32768, 512) == 43
    assert kernels.shares(4000, 64 * 600) == 1 and 1 < kernels.shares(10**9, 16) <= kernels.PROGRAMS


def test_a_share_of_all_rows(monkeypatch):
    from encdiff.kernels import column_sum as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    x = torch.randn(2100, 150)
    assert kernels.shares(*x.shape) == 1
    torch.testing.assert_close(column_sum(x, impl="triton"), x.double().sum(0).float(), rtol=1e-5, atol=1e-4)


def test_gradients_of_gradients_pass():
    x = torch.randn(5, 3, requires_grad=True)
    upstream = torch.randn(3)
    for impl in ("triton", "native", "reference"):
        (dx,) = torch.autograd.grad(column_sum(x, impl=impl), x, upstream)
        assert torch.equal(dx, upstream.expand(5, 3))


def test_opcheck():
    from encdiff.kernels import column_sum as kernels

    x = torch.randn(6, 10, requires_grad=True)
    torch.library.opcheck(kernels.column_sum, (x, torch.float32))
    torch.library.opcheck(kernels.column_sum, (x.detach(), torch.bfloat16))


@interpreted
def test_dispatch_says_why(monkeypatch):
    x = torch.randn(2, 4)
    assert "column_sum: triton: interpreted on the CPU" in ops.explain("column_sum", x, torch.float32)
    assert "column_sum: native: chosen" in ops.explain("column_sum", x, torch.float32)
    assert not is_fused(x) and is_fused(x, "triton") and not is_fused(x.double(), "triton")
    with pytest.raises(InputError, match="impl='triton' cannot serve .* x is torch.float64"):
        column_sum(x.double(), torch.float32, impl="triton")
    with pytest.raises(InputError, match="impl='triton' cannot serve .* the sum is torch.float64"):
        column_sum(x, torch.float64, impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputError, match="x is on cpu"):
        column_sum(x, impl="triton")


@pytest.mark.parametrize("x", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(4, 2, dtype=torch.int64)])
def test_bad_input(x):
    with pytest.raises(InputError, match=r"must be \(M, C\) of floating point"):
        column_sum(x)
