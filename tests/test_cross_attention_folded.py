"""What is computed from the tokens once per image: folded matrices."""

import pytest
import torch
from test_cross_attention_kernels import leaves
from torch._subclasses.fake_tensor import FakeTensorMode

from encdiff import ops
from encdiff.errors import InputError
from encdiff.ops import cross_attention_folded as folded_module
from encdiff.ops.cross_attention_folded import (
    Folded,
    cross_attention_folded,
    fold,
    fold_by_head,
    fold_pays,
    fold_projected,
)

pytestmark = pytest.mark.on_gpu
TOKEN_SIDE = ("context", "w_q", "w_k", "w_v", "w_o")


def split(tensors, make, heads) -> dict:
    """The arguments of `cross_attention_folded`."""
    rest = {n: t for n, t in tensors.items() if n not in TOKEN_SIDE}
    return rest | {"folded": make(*(tensors[n] for n in TOKEN_SIDE), heads=heads)}


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_folding_is_exact(impl):
    tensors = leaves(2, 9, 16, 5, 4, 2, 8, bias="token")
    arguments = split(tensors, fold, 2)
    folded = arguments["folded"]
    assert folded.keys.shape == folded.values.shape == (2, 2, 5, 16)
    for maps in (None, "head", "mean"):
        with ops.record_impls() as ran:
            actual = cross_attention_folded(**arguments, residual=True, maps=maps, impl=impl)
        assert ran == [("cross_attention_folded", impl)]
        expected = ops.cross_attention(**tensors, heads=2, residual=True, maps=maps, impl="reference")
        torch.testing.assert_close(actual, expected)


def test_folded_gradients():
    x, gamma, beta = torch.randn(1, 3, 4), torch.randn(4), torch.randn(4)
    keys, values = torch.randn(2, 1, 2, 3, 4)
    inputs = [t.double().requires_grad_() for t in (x, keys, values, gamma, beta)]

    def f(x, keys, values, gamma, beta):
        folded = folded_module.Folded(keys, values)
        return cross_attention_folded(x, folded, norm_weight=gamma, norm_bias=beta, residual=True, maps="head")

    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.on_cpu
@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(folded=folded_module.Folded(*torch.zeros(2, 3, 2, 5, 8))),
            r"folded keys \(3, 2, 5, 8\), .* x \(2, 4, 8\)",
        ),
        (dict(folded=folded_module.Folded(*torch.zeros(2, 2, 2, 5, 8, device="meta"))), "folded is on meta"),
        (dict(token_bias=torch.zeros(2, 4)), "with N = 5"),
        (dict(x=torch.zeros(2, 4, 8).double(), impl="triton"), "x is torch.float64"),
        (dict(folded=folded_module.Folded(*torch.zeros(2, 2, 2, 33, 8)), impl="triton"), "33 tokens must be"),
        (dict(x=torch.zeros(2, 4, 8).requires_grad_(), maps="mean", impl="triton"), "maps have no gradient there"),
    ],
)
def test_bad_folded_input(change, message):
    arguments = dict(x=torch.zeros(2, 4, 8), folded=folded_module.Folded(*torch.zeros(2, 2, 2, 5, 8))) | change
    with pytest.raises(InputError, match=message):
        cross_attention_folded(**arguments)


# ---- in the model


@pytest.mark.on_cpu
def test_folding_pays_where_it_saves_products():
    assert fold_pays(torch.zeros(1, 20, 16), 256, 8) and not fold_pays(torch.zeros(1, 20, 16), 64, 8)


@pytest.mark.on_cpu
def test_folding_pays_on_a_gpu_where_the_kernels_serve_it():
    with FakeTensorMode():  # a tensor on a GPU that need not be there
        context = torch.empty(1, 20, 16, device="cuda")
        assert fold_pays(context, 64, 8) and not fold_pays(context, 256, 8)
        assert fold_pays(context.bfloat16(), 256, 8) and not fold_pays(context.bfloat16(), 320, 8)


@pytest.mark.on_cpu
def test_sampling_folds_once_for_all_steps(model):
    scalars = torch.randn(2, 3)
    with ops.record_impls() as ran:
        images = model.sample(scalars, steps=3)
    assert {op for op, _ in ran if "cross" in op} == {"cross_attention_folded"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("encdiff.models.attention.fold_pays", lambda *sizes: False)
        torch.testing.assert_close(model.sample(scalars, steps=3), images, rtol=1e-4, atol=1e-4)


# ---- folding by head


def test_folding_by_head_is_folding():
    """Of keys and values that are columns of wider rows: results, gradients, and what a compiler may suppose."""
    heads, wide = 2, torch.randn(3, 5, 40, requires_grad=True)
    w_q, w_o = torch.randn(16, 24, requires_grad=True), torch.randn(24, 16, requires_grad=True)
    k, v = wide[..., :16], wide[..., 20:36]
    expected = fold_projected(k, v, w_q, w_o, heads=heads)
    actual = [t.transpose(0, 1) for t in fold_by_head(k, v, w_q, w_o, heads)]
    upstream = [torch.randn_like(t) for t in expected]
    torch.testing.assert_close(actual, list(expected))
    first, second = (torch.autograd.grad(y, (wide, w_q, w_o), upstream) for y in (actual, expected))
    torch.testing.assert_close(first, second)
    assert all(t.is_contiguous() for t in first)
    arguments = (t.detach().requires_grad_() for t in (k, v, w_q, w_o))
    torch.library.opcheck(fold_by_head, (*arguments, heads))


@pytest.mark.parametrize("order", ["heads outermost", "heads innermost"])
def test_layouts_of_folded_tokens(order):
    x, keys, values = torch.randn(2, 9, 16), *torch.randn(2, 2, 3, 5, 16).unbind()
    if order == "heads outermost":
        keys, values = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (keys, values))
    elif order == "heads innermost":
        keys, values = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (keys, values))
    tensors = [t.requires_grad_() for t in (x, keys, values)]
    outcomes = []
    for impl in ("triton", "reference"):
        y = cross_attention_folded(x, Folded(keys, values), impl=impl)
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-4)
