"""`out=`: every op of the noise engine writes into given tensors, its own input too; the draw counter is read anew."""

import math
import shutil

import pytest
import torch

from encdiff import ops
from encdiff.diffusion.schedules import alphas_cumprod, make_betas
from encdiff.ops import _build
from encdiff.ops.noise import TARGETS, q_sample, step

if not any(map(shutil.which, ("c++", "g++", "clang++"))) and _build.installed() is None:
    pytest.skip("no C++ compiler, and no native engine was installed", allow_module_level=True)

ALPHA_BAR = alphas_cumprod(make_betas("scaled_linear"))
T = len(ALPHA_BAR)
draw = torch.randn
LAYOUTS = {"contiguous": lambda x: x, "channels-last": lambda x: x.to(memory_format=torch.channels_last)}
LAYOUTS["sliced"] = lambda x: x.repeat(1, 1, 1, 2)[..., ::2]
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
impls = pytest.mark.parametrize("impl", ["native", "reference"])


def assert_out(run, *out):
    """`run(out)` writes every element of `out` and returns just those tensors, with what `run(None)` gives."""
    expected = run(None)
    made = run(out if len(out) > 1 else out[0])
    expected, made = (r if isinstance(r, tuple) else (r,) for r in (expected, made))
    assert len(made) == len(expected) and all(a is b for a, b in zip(made, out, strict=False))
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


@impls
@layouts
@pytest.mark.parametrize("prediction", TARGETS)
def test_q_sample_writes_into_out_and_in_place(prediction, layout, impl):
    shape, t = (3, 2, 5, 6), torch.tensor([1, 2, 999])
    x0, e = draw(shape), draw(shape)
    for noise, options in ((e, {}), (None, {"seed": 1, "draw": torch.tensor([4])}), (e, {"weights": torch.rand(T)})):

        def run(out, x0=x0, noise=noise, options=options):
            return q_sample(x0, noise, t, ALPHA_BAR, prediction, **options, out=out, impl=impl)

        expected = run(None)
        assert_out(run, *(layout(torch.full(shape, math.nan)) for _ in range(2)))
        in_place, target = x0.clone(), torch.full(shape, math.nan)
        run((in_place, target), x0=in_place)
        assert torch.equal(in_place, expected[0]) and torch.equal(target, expected[1])
        if noise is not None:
            over_noise = noise.clone()
            run((over_noise, target.fill_(math.nan)), noise=over_noise)
            assert torch.equal(over_noise, expected[0]) and torch.equal(target, expected[1])


@impls
@layouts
def test_step_writes_into_out_and_in_place(layout, impl):
    shape = (3, 2, 5, 6)
    x, output, noise, past = (layout(draw(shape)) for _ in range(4))
    c, out = draw((3, 6)), layout(torch.full(shape, math.nan))
    every = {"history": (past,), "return_x0": True, "clip": 0.5, "quantile": 0.9}
    plain = c[:, :5] * torch.tensor([1.0, 1, 1, 1, 0])
    assert_out(lambda out: step(x, output, plain, clip=0.5, out=out, impl=impl), out)
    assert_out(lambda out: step(x, output, c[:, :5], seed=3, out=out, impl=impl), out)
    assert_out(lambda out: step(x, output, c, noise, **every, out=out, impl=impl), out, torch.empty(shape))
    expected = step(x, output, c, noise, **every)
    for i in range(4):  # over x_t, the output, the noise, the past
        args = [a.clone() for a in (x, output, noise, past)]
        made = step(*args[:2], c, args[2], **{**every, "history": (args[3],)}, out=(args[i], out), impl=impl)
        assert made[0] is args[i] and torch.equal(args[i], expected[0]) and torch.equal(out, expected[1])


@impls
@pytest.mark.parametrize("op", [ops.normal, ops.uniform])
def test_random_numbers_are_written_into_out(op, impl):
    for out in (torch.full((3, 5), math.nan), torch.full((5, 3), math.nan).T, torch.empty(3, 5).half()):
        assert_out(lambda o, out=out: op((3, 5), 1, torch.arange(3), 2, dtype=out.dtype, out=o, impl=impl), out)


def test_the_draw_counter_is_read_at_each_call():
    """What lets a captured CUDA graph advance: a tensor that changes in place, and no copy of its number."""
    ids, counter, out = torch.arange(4), torch.zeros(1, dtype=torch.int64), torch.empty(4, 100)
    x, t, c = draw((4, 100)), torch.tensor([0, 1, 2, 3]), draw((4, 5))
    for i in range(3):
        assert torch.equal(ops.normal((4, 100), 1, ids, counter, out=out), ops.normal((4, 100), 1, ids, i))
        keyed = q_sample(x, None, t, ALPHA_BAR, seed=1, draw=counter, impl="native")
        assert torch.equal(keyed[1], out)
        assert torch.equal(step(x, x, c, seed=1, draw=counter, impl="native"), step(x, x, c, out, impl="native"))
        counter += 1


@impls
def test_out_is_written_in_one_graph(impl):
    def both(x, t, c, out):
        made = torch.empty_like(x), torch.empty_like(x)  # in the graph, unlike `out`
        x_t, v = q_sample(x, None, t, ALPHA_BAR, "v", seed=1, out=made, impl=impl)
        return step(x_t, v, c, clip=0.5, return_x0=True, out=out, impl=impl)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    x, t, c = draw((3, 2, 5)), torch.tensor([1, 2, 999]), draw((3, 5)) * torch.tensor([1.0, 1, 1, 1, 0])
    given, expected = ([x.clone(), t, c, tuple(torch.full(x.shape, math.nan) for _ in range(2))] for _ in range(2))
    for actual, exact in zip(compiled(*given), both(*expected), strict=True):
        torch.testing.assert_close(actual, exact)
    torch.testing.assert_close(given, expected)  # what was written into the tensors themselves


def test_out_is_checked():
    x, t, c = draw((2, 3)), torch.tensor([1, 2]), torch.zeros(2, 5)
    for call, says in [
        (lambda: q_sample(x, x, t, ALPHA_BAR, out=(x,)), "out has 1 tensors, must have 2"),
        (lambda: q_sample(x, x, t, ALPHA_BAR, out=(x, x)), "none of them twice"),
        (lambda: q_sample(x, x, t, ALPHA_BAR, out=(x, x[:1])), r"out is .*\(1, 3\).* x0's shape \(2, 3\)"),
        (lambda: step(x, x, c, out=x.half()), "out is torch.float16, must be of x_t's torch.float32"),
        (lambda: step(x, x.clone().requires_grad_(), c, out=x), "out .* asks for a gradient"),
        (lambda: ops.normal((2, 3), 1, t, out=x[:1]), r"out is .*\(1, 3\).*, must be torch.float32 \(2, 3\)"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
