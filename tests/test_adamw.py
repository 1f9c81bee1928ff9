import math
from functools import partial

import pytest
import torch
from _place import interpreted

from encdiff import ops
from encdiff.errors import InputError
from encdiff.ops.adamw import adamw

BETAS, EPS = (0.9, 0.99), 1e-8
CASES = {  # n, k or None, dtype of the gradient, copy, clipping
    "all of it": (2048 + 5, 1024 + 3, torch.bfloat16, True, True),
    "aligned": (2048, 1024, torch.bfloat16, True, False),
    "one program, no average": (37, None, torch.float32, False, True),
    "every element averaged": (1030, 1030, torch.float32, True, False),
    "none averaged": (64, 0, torch.float16, True, False),
    "one element": (1, 1, torch.bfloat16, True, True),
    "empty": (0, 0, torch.float32, True, False),
}


def buffers(n, k, dtype, copy):
    """Random master and average, moments of no step yet."""
    zeros = partial(torch.zeros, n)
    made = {"master": torch.randn(n), "exp_avg": zeros(), "exp_avg_sq": zeros()}
    made["average"] = None if k is None else torch.randn(k)
    made["weights"] = torch.full((n,), torch.nan, dtype=torch.bfloat16) if copy else None
    return made


def schedule(t, rate=0.01, follow=0.1, dtype=torch.float32):
    return torch.tensor([rate, follow, 1 - BETAS[0] ** t, 1 - BETAS[1] ** t], dtype=dtype)


def by_torch(made, gradients, scale, weight_decay):
    """The same steps by torch.optim.AdamW and torch.lerp in float64."""
    p = torch.nn.Parameter(made["master"].double())
    optimizer = torch.optim.AdamW([p], 1.0, BETAS, EPS, weight_decay)
    average = None if made["average"] is None else made["average"].double()
    for t, g in enumerate(gradients, 1):
        optimizer.param_groups[0]["lr"] = 0.01 * t
        p.grad = g.double() * (1.0 if scale is None else scale.double())
        optimizer.step()
        if average is not None:
            average = torch.lerp(average, p.detach()[: len(average)], 0.1 / t)
    return {"master": p.detach(), "average": average, **optimizer.state[p]}


@pytest.mark.on_gpu
@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_against_torchs_own_in_float64(case, impl):
    n, k, dtype, copy, clipping = CASES[case]
    made = buffers(n, k, dtype, copy)
    gradients = [torch.randn(n).to(dtype) * 10 ** (i - 2) for i in range(5)]
    scale = torch.tensor(0.3) if clipping else None
    expected = by_torch(made, gradients, scale, 0.1)
    options = {"betas": BETAS, "eps": EPS, "weight_decay": 0.1, "impl": impl}
    with ops.record_impls() as ran:
        for t, g in enumerate(gradients, 1):
            before = g.clone()
            assert adamw(gradient=g, schedule=schedule(t, 0.01 * t, 0.1 / t), scale=scale, **made, **options) is None
            assert torch.equal(g, before)
    assert set(ran) == {("adamw", impl)}
    for name in ("master", "exp_avg", "exp_avg_sq", "average"):
        if made[name] is not None:
            torch.testing.assert_close(made[name].double(), expected[name], rtol=2e-6, atol=2e-6, msg=name)
    if copy and impl == "reference":
        assert torch.equal(made["weights"], made["master"].bfloat16())
    elif copy:  # the interpreter cuts bfloat16 off instead of rounding
        torch.testing.assert_close(made["weights"].float(), made["master"], rtol=2**-7, atol=0)


def test_one_step_by_hand():
    made = buffers(1, 1, torch.float32, True) | {"master": torch.ones(1), "average": torch.zeros(1)}
    adamw(gradient=torch.full((1,), -3.0), schedule=schedule(1), betas=BETAS, weight_decay=0.5, **made)
    # the first step of Adam is the rate, against the gradient's sign
    assert made["master"].item() == pytest.approx(1 - 0.01 * 0.5 + 0.01, abs=1e-6)
    assert made["exp_avg"].item() == pytest.approx(-0.3) and made["exp_avg_sq"].item() == pytest.approx(0.09)
    assert made["average"].item() == pytest.approx(0.1 * 1.005, abs=1e-6)
    assert made["weights"].item() == torch.tensor(1.005).bfloat16().item()


@pytest.mark.on_gpu
def test_nothing_beyond_the_average_is_written():
    n, k = 1029, 1001
    wide = {name: torch.full((n + 100,), 7.0) for name in ("master", "exp_avg", "exp_avg_sq", "average")}
    views = {name: t[: k if name == "average" else n] for name, t in wide.items()}
    adamw(gradient=torch.ones(n), schedule=schedule(1), impl="triton", **views)
    for name, t in wide.items():
        end = len(views[name])
        assert (t[end:] == 7).all() and (t[:end] != 7).all(), name


@pytest.mark.on_gpu
def test_a_gradient_that_is_not_finite_is_seen():
    made, g = buffers(4, 2, torch.float32, True), torch.tensor([math.nan, 1.0, math.inf, 1.0])
    adamw(gradient=g, schedule=schedule(1), impl="triton", **made)
    assert made["master"].isfinite().tolist() == [False, True, False, True]
    assert made["average"].isfinite().tolist() == [False, True]


@pytest.mark.on_gpu
def test_opcheck():
    from encdiff.kernels import adamw as kernels

    for copy, k in ((True, 5), (False, None)):
        m = buffers(8, k, torch.bfloat16, copy)
        inputs = m["master"], torch.randn(8).bfloat16(), m["exp_avg"], m["exp_avg_sq"], schedule(1)
        options = m["average"], m["weights"], torch.ones(()) if copy else None, *BETAS, EPS, 0.1
        torch.library.opcheck(kernels.adamw, (*inputs, *options), test_utils=("test_schema", "test_faketensor"))


@interpreted
def test_dispatch_says_why(monkeypatch):
    made = buffers(4, 2, torch.float32, True)
    inputs = {"gradient": torch.ones(4), "schedule": schedule(1), **made}
    assert "adamw: triton: interpreted on the CPU" in ops.explain("adamw", **inputs)
    doubles = {name: made[name].double() for name in ("master", "exp_avg", "exp_avg_sq", "average")}
    with pytest.raises(InputError, match="impl='triton' cannot serve .* master and schedule are torch.float64"):
        adamw(**inputs | doubles, impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputError, match="master is on cpu"):
        adamw(**inputs, impl="triton")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(master=torch.zeros(2, 2)), r"master is \(2, 2\) of torch.float32, must be \(n,\)"),
        (dict(gradient=torch.zeros(3)), r"gradient is \(3,\), must be \(4,\) for master \(4,\)"),
        (dict(exp_avg=torch.zeros(4, dtype=torch.float64)), "exp_avg is torch.float64, must be of master's"),
        (dict(average=torch.zeros(5)), r"average is \(5,\), must be \(4,\)"),
        (dict(weights=torch.zeros(2)), r"weights is \(2,\), must be \(4,\)"),
        (dict(schedule=torch.zeros(3)), r"schedule is \(3,\), must be \(4,\)"),
        (dict(scale=torch.zeros(2)), r"scale is \(2,\), must be \(\)"),
        (dict(exp_avg_sq=torch.zeros(8)[::2]), "exp_avg_sq is on cpu, must be contiguous on master's cpu"),
    ],
)
def test_bad_input(change, message):
    inputs = {"gradient": torch.zeros(4), "schedule": schedule(1), **buffers(4, 2, torch.float32, True)}
    with pytest.raises(InputError, match=message):
        adamw(**inputs | change)
