"""The native noise engine against the reference: to the bit with given noise, to 4 ulp with its own."""

import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from scipy import stats

from encdiff import ops
from encdiff.diffusion.schedules import alphas_cumprod, make_betas
from encdiff.ops import _build, _native, philox
from encdiff.ops.noise import TARGETS, q_sample, step

if not any(map(shutil.which, ("c++", "g++", "clang++"))) and _build.installed() is None:
    pytest.skip("no C++ compiler, and no native engine was installed", allow_module_level=True)

ALPHA_BAR = alphas_cumprod(make_betas("scaled_linear"))
T = len(ALPHA_BAR)
SHAPES = [(3, 5, 7, 3), (7, 11), (4,), (2, 1000), (5, 3, 16, 16), (1, 70_001)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EVERY_SHAPE = [(shape, "float32") for shape in SHAPES] + [(SHAPES[0], "bfloat16"), (SHAPES[3], "float16")]
cases = pytest.mark.parametrize("shape,dtype", EVERY_SHAPE, ids=lambda c: str(c))


def draw(shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def ids_of(shape):
    return torch.randint(2**32, shape[:1])


def both(op, *args, **options):
    """What the native engine and the reference give; proves which ran."""
    with ops.record_impls() as ran:
        results = [op(*args, **options, impl=impl) for impl in ("native", "reference")]
    assert [impl for _, impl in ran] == ["native", "reference"]
    return [r if isinstance(r, tuple) else (r,) for r in results]


def ulps(a, b):
    """Distance in units of the last place of float32, for numbers of one sign."""
    assert torch.equal(a.sign(), b.sign())
    return (a.view(torch.int32).long() - b.view(torch.int32).long()).abs()


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_it_is_built_and_chosen():
    assert _native.load()[0] is None
    assert b"libstdc++.so.6\0" in _build.find_or_build(torch.version.cuda is not None).read_bytes(), "a copy within"
    x = draw((3, 4))
    assert ops.explain("step", x, x, draw((3, 5)), x) == "step: native: chosen\nstep: reference: can serve"


@cases
@pytest.mark.parametrize("prediction", TARGETS)
def test_q_sample_with_given_noise_equals_the_reference_to_the_bit(shape, dtype, prediction):
    x0, noise, t = draw(shape, DTYPES[dtype]), draw(shape, DTYPES[dtype]), torch.randint(T, shape[:1])
    schedule = torch.rand(T, 2) if prediction == "flow" else ALPHA_BAR
    ours, theirs = both(q_sample, x0, noise, t.int(), schedule, prediction, weights=torch.rand(T))
    assert_equal(ours, theirs)


@cases
def test_q_sample_with_keyed_noise(shape, dtype):
    x0, t, ids = draw(shape, DTYPES[dtype]), torch.randint(T, shape[:1]), ids_of(shape)
    key = {"seed": 2**64 - 5, "sample_ids": ids, "draw": torch.tensor(3)}
    for prediction in TARGETS:
        ours, theirs = both(q_sample, x0, None, t, ALPHA_BAR, prediction, **key)
        tol = {"float32": 5e-6, "bfloat16": 2**-7, "float16": 2**-10}[dtype]  # a rounding on either side
        torch.testing.assert_close(ours, theirs, rtol=tol, atol=tol)
    noise = ops.normal(shape, **key, impl="native").to(DTYPES[dtype])
    if dtype == "float32":  # the fused noise is that of ops.normal
        assert_equal(q_sample(x0, None, t, ALPHA_BAR, **key), q_sample(x0, noise, t, ALPHA_BAR))


@cases
@pytest.mark.parametrize("noisy", [True, False], ids=["noise", "plain"])
@pytest.mark.parametrize("rich", [True, False], ids=["history", "short"])
def test_step_equals_the_reference_to_the_bit(shape, dtype, noisy, rich):
    x, output, noise, *others = (draw(shape, DTYPES[dtype]) for _ in range(7))
    coefficients = draw((shape[0], 8 if rich else 5)).double()
    coefficients[:, 4] *= noisy
    options = {"unconditional": others[0], "guidance": 3.5, "history": others[1:], "return_x0": True} if rich else {}
    for clip, quantile in ((None, None), (0.7, None), (0.7, 0.93)):
        assert_equal(*both(step, x, output, coefficients, noise if noisy else None, clip, quantile=quantile, **options))
    row = coefficients[:1].float()
    assert_equal(*both(step, x, output, row, noise if noisy else None, 0.7, **options))


@pytest.mark.parametrize("quantile", [1e-9, 0.5, 0.995, 1.0])
@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 3000])
def test_dynamic_threshold_at_every_rank(size, quantile):
    """Ties, infinities and NaN among the values: the limit is a quantile of what sort gives."""
    x = draw((6, size))
    x[0] = x[0].round()
    x[1] = 0.25
    x[2, torch.randint(size, (1,))] = math.inf
    x[3, torch.randint(size, (1,))] = math.nan
    x[4] *= 1e-42
    c = torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0]])
    assert_equal(*both(step, x, x, c, clip=1e-3, quantile=quantile, return_x0=True))
    limit = torch.quantile(x[5].abs(), quantile).clamp(min=1e-3)
    ours = step(x, x, c, clip=1e-3, quantile=quantile, impl="native")[5]
    torch.testing.assert_close(ours, x[5].clamp(-limit, limit) * 1e-3 / limit)


def test_step_with_keyed_noise():
    x, output, c = draw((5, 77)), draw((5, 77)), draw((5, 5))
    key = {"seed": 4, "sample_ids": ids_of(x.shape), "draw": 9}
    torch.testing.assert_close(*both(step, x, output, c, **key), rtol=5e-6, atol=5e-6)
    assert torch.equal(step(x, output, c, **key), step(x, output, c, ops.normal(x.shape, **key)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_numbers(shape):
    ids = ids_of(shape)
    for stream in (0, 1):
        args = shape, 2**63 + 1, ids, 2**32 - 1
        ours, theirs = (f(*args, stream=stream) for f in (philox.uniform_op, philox.uniform_reference))
        assert torch.equal(ours, theirs)
        assert ulps(*(f(*args, stream=stream) for f in (philox.normal_op, philox.normal_reference))).max() <= 4


def test_normals_stay_within_4_ulp_of_the_exact_ones():
    args = (8, 250_000), 77, torch.arange(8), 1
    assert ulps(ops.normal(*args, impl="native"), ops.normal(*args, impl="reference")).max() <= 4


def test_ten_million_draws_are_normal_and_uncorrelated():
    n = 10_000_000
    z = ops.normal((10, n // 10), 1, torch.arange(10), 5, impl="native")
    flat = z.flatten().double()
    for power, expected in ((1, 0), (2, 1), (3, 0), (4, 3)):
        spread = math.sqrt(math.prod(range(1, 2 * power, 2)) / n)
        assert flat.pow(power).mean().item() == pytest.approx(expected, abs=5 * spread)
    assert (torch.corrcoef(z) - torch.eye(10)).abs().max() < 5 / math.sqrt(n / 10)
    for lag in (1, 2, 3, 4, 256):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 / math.sqrt(n)
    assert stats.kstest(flat.numpy(), "norm", method="asymp").pvalue > 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_and_rounding(dtype):
    """Every bit pattern of the 16-bit formats passes through, and float32 is rounded as PyTorch rounds it."""
    c = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]])
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    x = patterns.view(DTYPES[dtype]) if dtype != "float32" else torch.randint(-(2**31), 2**31 - 1, (1, 60_000)).int()
    x = x.view(DTYPES[dtype]).view(1, -1)
    assert_equal(*both(step, x, torch.zeros_like(x), c))
    half = c * 0.3
    assert_equal(*both(step, x, torch.zeros_like(x), half))


@pytest.mark.parametrize("keyed", [True, False], ids=["keyed", "given"])
@pytest.mark.parametrize(
    "layout",
    [lambda x: x.to(memory_format=torch.channels_last), lambda x: x.transpose(0, 1), lambda x: x[..., ::2]],
    ids=["channels-last", "transposed", "sliced"],
)
def test_strided_inputs(layout, keyed):
    x0 = layout(draw((4, 4, 6, 8)))
    noise, t = None if keyed else torch.randn(x0.shape), torch.randint(T, (4,))
    options = {"seed": 3, "sample_ids": torch.arange(8)[::2]} if keyed else {}
    ours, theirs = both(q_sample, x0, noise, t, ALPHA_BAR, "v", **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert ours[0].stride() == theirs[0].stride()
    c = draw((4, 6))
    assert_equal(*both(step, x0, torch.randn(x0.shape), c, torch.randn(x0.shape), history=(x0,), return_x0=True))


def test_a_batch_may_be_split_anywhere():
    x0, t, ids = draw((9, 3, 50)), torch.randint(T, (9,)), ids_of((9,))
    whole = q_sample(x0, None, t, ALPHA_BAR, "v", seed=1, sample_ids=ids, draw=2)
    for cut in (1, 4):
        parts = [
            q_sample(x0[s], None, t[s], ALPHA_BAR, "v", seed=1, sample_ids=ids[s], draw=2)
            for s in (slice(cut), slice(cut, None))
        ]
        assert all(torch.equal(w, torch.cat(p)) for w, p in zip(whole, zip(*parts, strict=True), strict=True))


def test_threads_change_nothing():
    args = (64, 1234), 5, torch.arange(64), 1
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    two = ops.normal(*args)
    torch.set_num_threads(1)
    assert torch.equal(two, ops.normal(*args))
    torch.set_num_threads(before)


def test_inputs_are_kept():
    x, output, c, t = draw((3, 70)), draw((3, 70)), draw((3, 5)), torch.tensor([1, 2, 999])
    kept = [a.clone() for a in (x, output, c, t)]
    q_sample(x, None, t, ALPHA_BAR, seed=1, impl="native")
    step(x, output, c, seed=1, impl="native")
    assert all(torch.equal(a, b) for a, b in zip((x, output, c, t), kept, strict=True))


def test_gradients_equal_the_reference():
    def gradients(impl, call, inputs):
        outputs = [y for y in call(impl, *inputs) if y.requires_grad]
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(y.shape, generator=generator) for y in outputs]
        return torch.autograd.grad(outputs, inputs, upstream)

    x, other, *past = (draw((4, 3, 5)).requires_grad_() for _ in range(6))
    t, c, weights = torch.tensor([0, 5, 500, 999]), draw((4, 7)), torch.rand(T)

    def noised(prediction):
        return lambda impl, x, e: q_sample(x, e, t, ALPHA_BAR, prediction, weights=weights, impl=impl)

    def stepped(impl, x, o, u, e, *history, quantile=None):
        rich = {"unconditional": u, "guidance": 2.0, "history": history, "return_x0": True, "quantile": quantile}
        return step(x, o, c, e, 0.8, **rich, impl=impl)

    calls = [(noised(p), (x, other)) for p in TARGETS]
    calls += [(lambda impl, x: q_sample(x, None, t, ALPHA_BAR, "v", seed=1, impl=impl), (x,))]
    calls += [
        (stepped, (x, other, *past)),
        (lambda impl, *inputs: stepped(impl, *inputs, quantile=0.8), (x, other, *past)),
        (lambda impl, x, o: (step(x, o, c[:, :5] * 1, seed=2, impl=impl),), (x, other)),
    ]
    for call, inputs in calls:
        torch.testing.assert_close(*(gradients(impl, call, inputs) for impl in ("native", "reference")))


def test_opcheck():
    x, ids, t, c = draw((3, 5)), torch.arange(3), torch.tensor([1, 2, 999]), draw((3, 6))
    _native.load()
    native = torch.ops.encdiff_native
    torch.library.opcheck(native.q_sample, (x, None, t, ALPHA_BAR, ALPHA_BAR, 2, ids, None, 4, 1))
    torch.library.opcheck(native.q_sample, (x.requires_grad_(), x.detach(), t, ALPHA_BAR, None, 0, None, None, 0, 0))
    y = x.detach()
    limits = native.threshold(y, y + 1, None, c, 0.7, 1.0, 0.9)
    args = (x, y + 1, None, c, limits, y - 1, y * 2, None, None, None, None, 0, 0, 0.7, 1.0, True)
    torch.library.opcheck(native.step, args)
    torch.library.opcheck(native.threshold, (y, y + 1, y, c, 0.7, 2.0, 0.9))
    out = torch.empty(3, 5)
    torch.library.opcheck(native.random_out, (0, ids, torch.tensor([3]), 0, 1, 0, out))
    out = x.detach().clone()
    torch.library.opcheck(native.step_out, (*args[:5], None, *args[6:11], 0, 0, math.inf, 1.0, out, None))


def test_one_graph_under_compile_for_any_batch():
    def both_ops(x, t, ids, draw, c):
        x_t, v = q_sample(x, None, t, ALPHA_BAR, "v", seed=1, sample_ids=ids, draw=draw)
        x = step(x_t, v, c, clip=1.0, quantile=0.9, out=torch.empty_like(x_t))
        return step(x, v, c, clip=1.0) + ops.normal((len(x), 6), 2, ids, draw).view_as(x)

    compiled = torch.compile(both_ops, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (3, 8):
        c = draw((batch, 5))
        c[:, 4] = 0
        args = draw((batch, 2, 3)), torch.randint(T, (batch,)), torch.arange(batch), torch.tensor(7), c
        torch.testing.assert_close(compiled(*args), both_ops(*args))


def test_what_it_cannot_serve_says_why():
    x, c = draw((2, 3)), draw((2, 5)).requires_grad_()
    t = torch.tensor([1, 2])
    for call, why in [
        (lambda: q_sample(x.double(), x.double(), t, ALPHA_BAR, impl="native"), "dtype is torch.float64"),
        (lambda: q_sample(x, x.half(), t, ALPHA_BAR, impl="native"), "noise is torch.float16, unlike"),
        (lambda: q_sample(x[:0], x[:0], t[:0], ALPHA_BAR, impl="native"), "empty"),
        (lambda: step(x, x, c, x, impl="native"), "coefficients ask for a gradient"),
        (lambda: step(x, x, c.detach(), x, history=(x,), impl="native"), r"coefficients .* \(2, 6\)"),
    ]:
        with pytest.raises(ValueError, match=why):
            call()


@pytest.mark.parametrize(
    "change,says",
    [
        ({2: torch.tensor([0, T])}, "t is 1000, must lie in 0 to 999"),
        ({2: torch.tensor([0])}, "t must be 2"),
        ({0: torch.zeros(2, 5).double()}, "float32, bfloat16 or float16"),
        ({0: torch.zeros(5, 2).T}, "x0 must be contiguous"),
        ({1: torch.zeros(2, 4)}, "noise has 8 elements"),
        ({1: torch.zeros(2, 5).half()}, "noise has .* dtype"),
        ({1: None}, "noise or sample_ids"),
        ({3: torch.zeros(T, 3)}, "1 or 2 columns"),
        ({4: torch.zeros(T - 1)}, "loss_weights has 999 rows, must have the schedule's 1000"),
    ],
)
def test_the_library_op_guards_memory(change, says):
    _native.load()
    args = [torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([0, 1]), ALPHA_BAR, None, 1, None, None, 0, 0]
    for i, value in change.items():
        args[i] = value
    with pytest.raises(RuntimeError, match=says):
        torch.ops.encdiff_native.q_sample(*args)


DIGEST = """
import hashlib, torch
from encdiff import ops
x = ops.normal((5, 1000), 3, torch.arange(5), 4, impl="native")
y = ops.step(x.half(), x.half(), x[:, :5].contiguous(), seed=1, clip=2.0, impl="native")
print(hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest())
"""


def python(code, **environment):
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_every_instruction_set_gives_the_same_bits():
    digests = {isa: python(DIGEST, ENCDIFF_ISA=isa).stdout for isa in ("baseline", "avx2", "avx512")}
    assert len(set(digests.values())) == 1, digests


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@cases
def test_the_gpu_gives_the_numbers_of_the_cpu(shape, dtype):
    x, output, noise = (draw(shape, DTYPES[dtype]) for _ in range(3))
    t, ids, c, key = torch.randint(T, shape[:1]), ids_of(shape), draw((shape[0], 6)), {"seed": 2**63 + 7, "draw": 5}
    z, z_gpu = ops.normal(shape, sample_ids=ids, **key), ops.normal(shape, sample_ids=ids.cuda(), **key, impl="native")
    assert ulps(z_gpu.cpu(), z).max() <= 4
    on_gpu = [a.cuda() for a in (x, output, noise, t, ids, c, ALPHA_BAR)]
    tol = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10}[dtype]

    def run(x, output, noise, t, ids, c, alpha_bar):
        given = q_sample(x, noise, t, alpha_bar, "v", impl="native")
        thresholded = step(x, output, c[:, :5], noise, 0.7, quantile=0.9, impl="native")
        keyed = q_sample(x, None, t, alpha_bar, "flow", sample_ids=ids, **key, impl="native")
        return *given, *keyed, thresholded, step(x, output, c, noise, 0.7, history=(x,), impl="native")

    for ours, theirs in zip(run(*on_gpu), run(x, output, noise, t, ids, c, ALPHA_BAR), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=tol, atol=tol)


@needs_gpu
def test_a_captured_graph_advances_with_the_draw_counter():
    ids, counter = torch.arange(4, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    ops.normal((4, 100), 1, ids, counter, impl="native")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = ops.normal((4, 100), 1, ids, counter, impl="native")
        counter += 1
    counter.zero_()
    for i in range(3):
        graph.replay()
        assert torch.equal(z, ops.normal((4, 100), 1, ids, i, impl="native"))


@needs_gpu
def test_a_bad_timestep_stops_the_gpu_with_a_message():
    code = (
        "import torch; from encdiff import ops; x = torch.zeros(2, 4, device='cuda'); a = torch.rand(9, device='cuda')"
    )
    code += "; ops.q_sample(x, None, torch.tensor([0, 9], device='cuda'), a, seed=1, impl='native')"
    code += "; torch.cuda.synchronize()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0 and "t must lie in 0 to T - 1" in done.stderr
