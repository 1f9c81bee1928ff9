import numpy as np
import pytest
import torch

from encdiff.diffusion.schedules import alphas_cumprod, make_betas
from encdiff.errors import InputError
from encdiff.ops._dispatch import explain, record_impls
from encdiff.ops.noise import PREDICTIONS, q_sample, step

ALPHA_BAR = alphas_cumprod(make_betas("scaled_linear"))
T = len(ALPHA_BAR)
CASES = [  # shape, dtype, tolerance relative to the terms of the sum: one rounding to the storage type
    ((3, 5, 7, 3), torch.float32, 3e-7),
    ((7, 11), torch.float32, 3e-7),
    ((4,), torch.float32, 3e-7),
    ((0, 3, 2, 2), torch.float32, 3e-7),
    ((3, 5, 7, 3), torch.float64, 1e-15),
    ((3, 5, 7, 3), torch.bfloat16, 2**-8),
    ((3, 5, 7, 3), torch.float16, 2**-11),
]
cases = pytest.mark.parametrize("shape,dtype,tol", CASES, ids=lambda c: str(c).removeprefix("torch."))


def draw(shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def numpy64(*tensors):
    return [t.double().numpy() for t in tensors]


def assert_near(ours, expected, terms, tol):
    assert ours.shape == expected.shape
    assert np.abs(ours.double().numpy() - expected).max(initial=0) <= tol * sum(map(np.abs, terms)).max(initial=0)


@cases
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_q_sample_equals_the_formula(shape, dtype, tol, prediction):
    x0, noise, t = draw(shape, dtype), draw(shape, dtype), torch.randint(T, shape[:1])
    kept = x0.clone(), noise.clone()
    x_t, target = q_sample(x0, noise, t, ALPHA_BAR, prediction)
    assert x_t.dtype == target.dtype == dtype
    x, e = numpy64(x0, noise)
    a = ALPHA_BAR.numpy()[t.numpy()].reshape(-1, *[1] * (x.ndim - 1))
    noised, v = (np.sqrt(a) * x, np.sqrt(1 - a) * e), (np.sqrt(a) * e, -np.sqrt(1 - a) * x)
    assert_near(x_t, sum(noised), noised, tol)
    assert_near(target, {"epsilon": e, "x0": x, "v": sum(v)}[prediction], v, tol)
    assert torch.equal(x0, kept[0]) and torch.equal(noise, kept[1])


def test_q_sample_keeps_precision_at_the_smallest_noise():
    x0, noise = torch.zeros(1, 3), torch.ones(1, 3)
    x_t, _ = q_sample(x0, noise, torch.tensor([0]), torch.tensor([1 - 1e-9], dtype=torch.float64))
    torch.testing.assert_close(x_t, torch.full((1, 3), 1e-9**0.5), rtol=1e-6, atol=0)


def test_x_t_and_v_give_back_x0_and_noise():
    x0, noise, t = draw((5, 3, 4)), draw((5, 3, 4)), torch.tensor([0, 1, 500, 998, 999], dtype=torch.int32)
    x_t, v = q_sample(x0, noise, t, ALPHA_BAR, "v")
    signal, sigma = (c.float()[t].view(-1, 1, 1) for c in (ALPHA_BAR.sqrt(), (1 - ALPHA_BAR).sqrt()))
    torch.testing.assert_close(signal * x_t - sigma * v, x0)
    torch.testing.assert_close(sigma * x_t + signal * v, noise)


def test_strided_input_and_mixed_dtypes():
    x0, noise = draw((3, 6, 4, 5)).permute(0, 3, 1, 2), draw((3, 5, 6, 4)).to(torch.bfloat16)
    t = torch.tensor([3, 800, 40])
    x_t, target = q_sample(x0, noise, t, ALPHA_BAR, "v")
    expected = q_sample(x0.contiguous(), noise.float(), t, ALPHA_BAR, "v")
    assert torch.equal(x_t, expected[0]) and torch.equal(target, expected[1])
    assert x_t.stride() == x0.stride()


@cases
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("noisy", [True, False], ids=["noise", "no-noise"])
def test_step_equals_the_formula(shape, dtype, tol, clip, noisy):
    x_t, output, noise = (draw(shape, dtype) for _ in range(3))
    coefficients = draw((shape[0], 5))
    coefficients[:, 4] *= noisy
    x_prev = step(x_t, output, coefficients, noise if noisy else None, clip)
    assert x_prev.dtype == dtype
    x, out, e = numpy64(x_t, output, noise)
    c0, c1, c2, c3, c4 = coefficients.double().numpy().T.reshape(5, -1, *[1] * (x.ndim - 1))
    x0 = c0 * x + c1 * out
    x0 = x0 if clip is None else np.clip(x0, -clip, clip)
    terms = c2 * c0 * x, c2 * c1 * out, c3 * x, c4 * e
    assert_near(x_prev, c2 * x0 + c3 * x + c4 * e, terms, 2 * tol)


@pytest.mark.parametrize("quantile", [0.3, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(3, 5, 7, 3), (4, 1), (2,), (0, 3), (3, 0)], ids=str)
def test_dynamic_threshold_equals_the_formula(shape, quantile):
    x_t, output, c = draw(shape), 3 * draw(shape), draw((shape[0], 5))
    c[:, 4] = 0
    x_prev, x0 = step(x_t, output, c, clip=0.7, quantile=quantile, return_x0=True)
    c0, c1, c2, c3, _ = c.double().numpy().T.reshape(5, -1, *[1] * (len(shape) - 1))
    x, out = numpy64(x_t, output)
    expected = c0 * x + c1 * out
    if expected.size:
        s = np.quantile(np.abs(expected).reshape(shape[0], -1), quantile, axis=1).clip(0.7)
        s = s.reshape(-1, *[1] * (len(shape) - 1))
        expected = np.clip(expected, -s, s) * 0.7 / s
    np.testing.assert_allclose(x0, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(x_prev, c2 * expected + c3 * x, rtol=1e-4, atol=1e-5)


def test_one_row_of_coefficients_serves_all():
    x, output, noise, row = draw((4, 3, 2)), draw((4, 3, 2)), draw((4, 3, 2)), draw((1, 5))
    assert torch.equal(step(x, output, row, noise, 0.8), step(x, output, row.expand(4, 5), noise, 0.8))


def test_gradients():
    x0, noise = (draw((3, 2, 3), torch.float64).requires_grad_() for _ in range(2))
    t = torch.tensor([7, 400, 990])
    for prediction in PREDICTIONS:
        torch.autograd.gradcheck(lambda x, e, p=prediction: q_sample(x, e, t, ALPHA_BAR, p), (x0, noise))
    output, c = draw((3, 2, 3), torch.float64).requires_grad_(), draw((3, 5), torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda *a: step(*a, clip=0.8), (x0, output, c, noise))


def test_the_reference_ran_and_is_explained():
    x, c = draw((2, 3)), draw((2, 5))
    with record_impls() as ran:
        q_sample(x.double(), x.double(), torch.tensor([1, 2]), ALPHA_BAR)
        step(x, x, c, x, impl="reference")
    assert ran == [("q_sample", "reference"), ("step", "reference")]
    says = explain("step", x.double(), x, c, x)
    assert says == "step: native: dtype is torch.float64; noise is torch.float32, unlike the batch's torch.float64; " \
        "model_output is torch.float32, unlike the batch's torch.float64\nstep: reference: chosen"  # fmt: skip
    with pytest.raises(InputError, match="'fused'"):
        step(x, x, c, x, impl="fused")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_graph_under_compile(dtype):
    def both(x, e, t, c):
        x_t, v = q_sample(x, e, t, ALPHA_BAR, "v")
        return step(x_t, v, c, e, clip=1.0)

    args = draw((3, 4), dtype), draw((3, 4), dtype), torch.tensor([1, 500, 999]), draw((3, 5))
    compiled = torch.compile(both, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*args), both(*args))


X, C, INTS = torch.zeros(3, 2, 2), torch.zeros(3, 5), torch.tensor([1, 2, 3])


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: q_sample(X, X, INTS, ALPHA_BAR, "eps"), "prediction is 'eps', must be one of epsilon, v, x0, flow"),
        (lambda: q_sample(X.long(), X, INTS, ALPHA_BAR), "x0 is torch.int64"),
        (lambda: q_sample(X[0, 0, 0], X, INTS, ALPHA_BAR), "x0 .* batch axis"),
        (lambda: q_sample(X, X[:2], INTS, ALPHA_BAR), r"noise .*\(2, 2, 2\).* x0's shape \(3, 2, 2\)"),
        (lambda: q_sample(X, X.long(), INTS, ALPHA_BAR), "noise is torch.int64"),
        (lambda: q_sample(X, X, INTS[:2], ALPHA_BAR), r"t is torch.int64 \(2,\).*\(3,\).* x0 \(3, 2, 2\)"),
        (lambda: q_sample(X, X, INTS.float(), ALPHA_BAR), "t is torch.float32"),
        (lambda: q_sample(X, X, INTS + 997, ALPHA_BAR), "t spans 998 to 1000, must lie in 0 to 999"),
        (lambda: q_sample(X, X, INTS - 2, ALPHA_BAR), "t spans -1 to 1"),
        (lambda: q_sample(X, X, INTS, ALPHA_BAR[:3]), "must lie in 0 to 2: alphas_cumprod has 3 entries"),
        (lambda: q_sample(X, X, INTS, ALPHA_BAR[None]), r"alphas_cumprod is torch.float64 \(1, 1000\)"),
        (lambda: q_sample(X, X, INTS, ALPHA_BAR.to("meta")), "alphas_cumprod .* on meta, must be .* on x0's cpu"),
        (lambda: step(X.int(), X, C), "x_t is torch.int32"),
        (lambda: step(X, X[..., :1], C), r"model_output .*\(3, 2, 1\).* x_t's shape \(3, 2, 2\)"),
        (lambda: step(X, X, C, X[:1]), r"noise .*\(1, 2, 2\)"),
        (lambda: step(X, X, C[:2]), r"coefficients is torch.float32 \(2, 5\).*\(3, 5\) or \(1, 5\)"),
        (lambda: step(X, X, C[:, :4]), r"coefficients is torch.float32 \(3, 4\)"),
        (lambda: step(X, X, C.half()), "coefficients is torch.float16"),
        (lambda: step(X, X, C + 1), "noise is None"),
        (lambda: step(X, X, C, clip=0.0), "clip is 0.0"),
        (lambda: step(X, X, C, clip=float("nan")), "clip is nan"),
        (lambda: step(X, X, C, quantile=0.9), "quantile, clip are 0.9, None"),
        (lambda: step(X, X, C, clip=1.0, quantile=0.0), "quantile, clip are 0.0, 1.0"),
        (lambda: step(X, X, C, clip=1.0, quantile=99.5), r"quantile, clip are 99.5, 1.0; must be in \(0, 1\]"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_on_the_gpu_without_a_stall(prediction):
    x0, noise, c, t = draw((5, 3, 7)), draw((5, 3, 7)), draw((5, 5)), torch.randint(T, (5,))
    on_gpu = [v.cuda() for v in (x0, noise, t, ALPHA_BAR)]
    c_gpu = c.cuda()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        x_t, target = q_sample(*on_gpu, prediction)
        x_prev = step(x_t, target, c_gpu, on_gpu[1], clip=1.0)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    expected = q_sample(x0, noise, t, ALPHA_BAR, prediction)
    torch.testing.assert_close((x_t.cpu(), target.cpu()), expected)
    torch.testing.assert_close(x_prev.cpu(), step(*expected, c, noise, clip=1.0), rtol=1e-5, atol=1e-5)
