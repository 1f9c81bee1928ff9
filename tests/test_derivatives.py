"""Every op and implementation under PyTorch's other ways to differentiate, vmap, and on the meta device.

Each is right, against finite differences and against the reference, or an error that says what can.
"""

import numpy as np
import pytest
import torch
from _place import interpreted
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import hvp
from torch.func import grad, jacrev, jvp, vmap

from encdiff import ops
from encdiff.errors import InputError
from encdiff.ops.cross_attention_folded import Folded, cross_attention_folded

pytestmark = interpreted
B, L, C, N, D, H = 2, 6, 16, 3, 8, 2


def learnt(x: Tensor) -> Tensor:
    """A bias that asks for a gradient, where one may be asked for."""
    bias = drawn(C, like=x)
    return bias if ops._dispatch.is_transformed() else bias.requires_grad_()


class Case:
    """`run(x, impl)`, a smooth function of one tensor; everything else is drawn once, on the tensor's device."""

    def __init__(self, op: str, shape: tuple[int, ...], run, impls: tuple[str, ...] = ()):
        self.op, self.shape, self.run = op, shape, run
        self.impls = impls or tuple(i.name for i in ops.OPS[op].implementations)


def drawn(*shape: int, like: Tensor, scale: float = 1.0) -> Tensor:
    """The same numbers in every call: a function of its tensor alone."""
    if like.device.type == "meta":
        return torch.empty(shape, device="meta")
    numbers = np.random.default_rng(sum(shape)).standard_normal(shape) * scale  # no random operation: vmap forbids it
    return torch.from_numpy(numbers).float()


def weights(x: Tensor, width: int) -> list[Tensor]:
    shapes = (C, C), (C, width), (C, width), (C, C)
    return [drawn(*s, like=x, scale=s[1] ** -0.5) for s in shapes]


def norm(x: Tensor) -> dict:
    return {"norm_weight": 1 + drawn(C, like=x, scale=0.1), "norm_bias": drawn(C, like=x), "residual": True}


def bank(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    pairs = (1, 8), (8, 8), (8, D)
    return [drawn(N, o, i, like=x, scale=i**-0.5) for i, o in pairs], [drawn(N, o, like=x) for _, o in pairs]


def cross(x, impl, context=None):
    context = drawn(B, N, D, like=x) if context is None else context
    x = drawn(B, L, C, like=context) if x is None else x
    return ops.cross_attention(x, context, *weights(context, D), heads=H, **norm(context), impl=impl)


def folded(x, impl):
    tokens = Folded(*(drawn(B, H, N, C, like=x, scale=0.3) for _ in range(2)))
    return cross_attention_folded(x, tokens, drawn(C, like=x), **norm(x), impl=impl)


def group(x, impl):
    modulation = {"scale": drawn(B, C, like=x, scale=0.3), "shift": drawn(B, C, like=x)}
    return ops.group_norm(x, 1 + drawn(C, like=x), drawn(C, like=x), 8, **modulation, silu=True, impl=impl)


def schedule(x: Tensor) -> tuple[Tensor, Tensor]:
    t, alpha_bar = torch.tensor([3, 700]), torch.linspace(0.99, 0.01, 1000, dtype=torch.float64)
    return t.to(x.device), alpha_bar.to(x.device)


def noised(x, impl, key=False):
    t, alpha_bar = schedule(x)
    drawing = {"seed": 1, "sample_ids": t} if key else {}
    noise = None if key else drawn(*x.shape, like=x)
    return ops.q_sample(x, noise, t, alpha_bar, "v", **drawing, impl=impl)[key] ** 2


def stepped(x, impl):
    return ops.step(x, drawn(*x.shape, like=x), drawn(B, 5, like=x).abs(), noise=x, impl=impl) ** 2


def biased(x, impl):
    return ops.group_norm(x, 1 + drawn(C, like=x), drawn(C, like=x), 8, silu=True, x_bias=learnt(x), impl=impl)


CASES = {
    "cross_attention": Case("cross_attention", (B, L, C), cross),
    "cross_attention of its tokens": Case("cross_attention", (B, N, D), lambda s, impl: cross(None, impl, s)),
    "cross_attention_folded": Case("cross_attention_folded", (B, L, C), folded),
    "self_attention": Case("self_attention", (B, L, C), lambda x, impl: ops.self_attention(
        x, *weights(x, C), heads=H, **norm(x), impl=impl)),
    "mlp_bank": Case("mlp_bank", (B, N), lambda s, impl: ops.mlp_bank(s, *bank(s), impl=impl)),
    "mlp_bank, silu": Case("mlp_bank", (B, N), lambda s, impl: ops.mlp_bank(s, *bank(s), "silu", impl=impl)),
    "group_norm": Case("group_norm", (B, C, 4, 4), group),
    "group_norm, biased": Case("group_norm", (B, C, 4, 4), biased),
    "layer_norm": Case(
        "layer_norm", (B, L, C), lambda x, impl: ops.layer_norm(x, drawn(C, like=x), drawn(C, like=x), impl=impl)
    ),
    "geglu": Case("geglu", (B, L, C), lambda x, impl: ops.geglu(x, impl=impl)),
    "projection": Case("projection", (B, L, C), lambda x, impl: ops.projection(
        x, drawn(2 * C, C, like=x), drawn(2 * C, like=x), norm_weight=drawn(C, like=x), norm_bias=drawn(C, like=x),
        gated=True, residual=x, impl=impl), ("native", "reference")),
    "resample": Case("resample", (B, C, 5, 4), lambda x, impl: ops.resample(
        x, "down", beside=x**2, impl=impl)[1]),
    "resample, up": Case("resample", (B, C, 3, 2), lambda x, impl: ops.resample(x, "up", impl=impl) ** 2),
    "column_sum": Case("column_sum", (7, 5), lambda x, impl: ops.column_sum(x**2, impl=impl)),
    "linear": Case("column_sum", (B, C), lambda x, impl: ops.linear(
        x, drawn(C, C, like=x), learnt(x), impl=impl) ** 2),
    "conv2d": Case("column_sum", (B, C, 4, 4), lambda x, impl: ops.conv2d(
        x, drawn(4, C, 3, 3, like=x), drawn(4, like=x), padding=1, impl=impl) ** 2),
    "residual_add": Case("residual_add", (B, C, 4, 4), lambda x, impl: ops.residual_add(
        x**2, x.sin(), learnt(x), impl=impl) ** 2),
    "q_sample": Case("q_sample", (B, 3, 4, 4), noised),
    "q_sample, drawn": Case("q_sample", (B, 3, 4, 4), lambda x, impl: noised(x, impl, True)),
    "step": Case("step", (B, 3, 4, 4), stepped),
}  # fmt: skip
ALL = [(name, impl) for name, case in CASES.items() for impl in (None, *case.impls)]


@pytest.fixture
def case(request):
    return CASES[request.param]


def features(shape: tuple[int, ...]) -> Tensor:
    """Maps are channels-last, as in a U-Net."""
    x = torch.randn(shape)
    return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-9)).item()


def finite_difference(f, x: Tensor, v: Tensor) -> Tensor:
    return (f(x + 1e-3 * v) - f(x - 1e-3 * v)) / 2e-3


def says_what_can(error: Exception, impl: str | None) -> None:
    assert impl not in (None, "reference"), f"chosen, and failed: {error}"
    assert "'reference'" in str(error), error


@pytest.mark.parametrize("name, impl", ALL)
def test_forward_mode_and_torch_func(name, impl):
    case = CASES[name]
    x = features(case.shape)
    v, run = torch.randn_like(x), lambda z: case.run(z, impl)
    y = case.run(x, "reference")
    u, leaf = torch.randn_like(y), x.clone().requires_grad_()
    gradient = torch.autograd.grad((case.run(leaf, "reference") * u).sum(), leaf)[0]
    checks = {
        "jvp": (lambda: jvp(run, (x,), (v,))[1], finite_difference(lambda z: case.run(z, "reference"), x, v), 2e-3),
        "dual": (lambda: forward(run, x, v), finite_difference(lambda z: case.run(z, "reference"), x, v), 2e-3),
        "grad": (lambda: grad(lambda z: (run(z) * u).sum())(x), gradient, 1e-5),
        "vmap": (lambda: vmap(run)(torch.stack([x + 1, x]))[1], y, 1e-5),
        "grad of vmap": (lambda: vmap(grad(lambda z: (run(z) * u).sum()))(torch.stack([v, x]))[1], gradient, 1e-5),
        "jacrev": (
            lambda: torch.tensordot(u, jacrev(run)(x), u.ndim),
            gradient,
            1e-5,
        ),
    }
    for title, (work, expected, tolerance) in checks.items():
        try:
            actual = work()
        except InputError as error:
            says_what_can(error, impl)
        else:
            assert relative(actual, expected) < tolerance, title


def forward(run, x: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(x, v))).tangent


@pytest.mark.parametrize("name, impl", ALL)
def test_second_derivatives(name, impl):
    case = CASES[name]
    x = features(case.shape)
    v = torch.randn_like(x)
    u = torch.randn_like(case.run(x, "reference"))

    def second(impl) -> Tensor:
        z = x.clone().requires_grad_()
        (first,) = torch.autograd.grad((case.run(z, impl) * u).sum(), z, create_graph=True)
        return torch.autograd.grad((first * v).sum(), z)[0]

    expected = second("reference")
    difference = finite_difference(
        lambda z: torch.autograd.grad((case.run(z := z.requires_grad_(), "reference") * u).sum(), z)[0], x, v
    )
    assert relative(expected, difference) < 1e-2
    try:
        actual = second(impl)
    except NotImplementedError as error:
        assert impl != "reference" and "take encdiff.use_impl('reference')" in str(error)
    else:
        assert relative(actual, expected) < 1e-5


def test_under_torch_compile():
    """Compiled code knows whether it is transformed, within or from without, and the kernels are its choice if not."""
    x, v = torch.randn(B, L, C), torch.randn(B, L, C)

    def f(x):
        return ops.geglu(x)

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    with ops.use_impl("triton"):
        for _ in range(2):
            with pytest.raises(InputError, match="but through 'reference'"):
                vmap(f)(x)
            torch.testing.assert_close(compiled(x), ops.geglu(x, impl="reference"))
    torch.testing.assert_close(vmap(compiled)(x), f(x))
    tangent = torch.compile(lambda x, v: jvp(f, (x,), (v,))[1], fullgraph=True, backend="eager")(x, v)
    assert relative(tangent, finite_difference(f, x, v)) < 2e-3


def test_a_first_derivative_that_keeps_its_graph_is_no_error():
    x = torch.randn(B, L, C, requires_grad=True)
    for impl in ("native", "sdpa", "triton"):
        (g,) = torch.autograd.grad(cross(x, impl).sum(), x, create_graph=True)
        expected = torch.autograd.grad(cross(x, "reference").sum(), x)[0]
        assert relative(g.detach(), expected) < 1e-5


def test_the_model(model):
    """`denoise` as a function of the scalars."""
    model.requires_grad_(False)
    s, x = torch.randn(2, 3), torch.randn(2, *model.latent_shape)
    t, v = torch.tensor([3, 500]), torch.randn(2, 3)

    def f(s):
        return model.denoise(x, t, model.tokens(s))

    assert relative(jvp(f, (s,), (v,))[1], finite_difference(f, s, v)) < 5e-3
    assert relative(torch.einsum("bchwij,ij->bchw", jacrev(f)(s), v), jvp(f, (s,), (v,))[1]) < 1e-4

    def alone(s, x, t):
        return model.denoise(x[None], t[None], model.tokens(s[None])).square().sum()

    leaf = s.clone().requires_grad_()
    expected = torch.autograd.grad(model.denoise(x, t, model.tokens(leaf)).square().sum(), leaf)[0]
    assert relative(vmap(grad(alone))(s, x, t), expected) < 1e-4
    with pytest.raises(NotImplementedError, match=r"encdiff.use_impl\('reference'\)"):
        hvp(lambda s: f(s).square().sum(), s, v)
    with ops.use_impl("reference"):
        curved = hvp(lambda s: f(s).square().sum(), s, v)[1]

    def gradient(s):
        leaf = s.clone().requires_grad_()
        return torch.autograd.grad(f(leaf).square().sum(), leaf)[0]

    assert relative(curved, finite_difference(gradient, s, v)) < 2e-2


@pytest.mark.parametrize("name", CASES)
def test_shapes_on_meta(name):
    case = CASES[name]
    y = case.run(torch.empty(case.shape, device="meta"), None)
    assert y.device.type == "meta" and y.shape == case.run(torch.randn(case.shape), "reference").shape


def test_the_model_on_meta(model):
    model.to("meta")
    s, x = torch.empty(2, 3, device="meta"), torch.empty(2, *model.latent_shape, device="meta")
    assert model.denoise(x, torch.empty(2, device="meta", dtype=torch.int64), model.tokens(s)).shape == x.shape
    assert model.encode(torch.empty(2, 3, 16, 16, device="meta")).shape == (2, 3)


def test_random_numbers_under_vmap():
    ids = torch.arange(6).view(3, 2)
    for op in (ops.normal, ops.uniform):
        expected = torch.stack([op((2, 5), 7, i) for i in ids])
        torch.testing.assert_close(vmap(lambda i, op=op: op((2, 5), 7, i))(ids), expected)
