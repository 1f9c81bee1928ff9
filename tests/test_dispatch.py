import logging

import pytest
import torch

from encdiff import ops
from encdiff.errors import InputError
from encdiff.ops import _dispatch
from encdiff.ops._dispatch import Implementation, Op


@pytest.fixture
def op(monkeypatch):
    """Two implementations: `even` refuses odd numbers, `any` takes all."""
    monkeypatch.setattr(_dispatch, "OPS", {})
    monkeypatch.setattr(_dispatch, "_logged", set())
    even = Implementation("even", lambda x: ("even", x), lambda x: [] if x % 2 == 0 else ["x is odd"])
    return Op("parity", [even, Implementation("any", lambda x: ("any", x), lambda x: [])])


def test_auto_takes_the_first_without_reasons(op):
    assert op(4) == ("even", 4)
    assert op(3) == ("any", 3)


def test_a_forced_implementation_runs_or_raises_its_reasons(op):
    assert op(4, impl="any") == ("any", 4)
    with pytest.raises(InputError, match=r"parity: impl='even' cannot serve this input: x is odd"):
        op(3, impl="even")
    with pytest.raises(InputError, match=r"impl='fast' must be one of \['even', 'any'\]"):
        op(3, impl="fast")


def test_use_impl_nests_and_ends(op):
    with ops.use_impl("any"):
        assert op(4) == ("any", 4)
        with ops.use_impl("auto"):
            assert op(4) == ("even", 4)
        assert op(4) == ("any", 4)
    assert op(4) == ("even", 4)
    with pytest.raises(InputError, match="must be 'auto' or one of"), ops.use_impl("fast"):
        pass


def test_the_environment_sets_the_default(op, monkeypatch):
    monkeypatch.setenv("ENCDIFF_IMPL", "any")
    assert op(4) == ("any", 4)
    monkeypatch.setenv("ENCDIFF_IMPL", "fast")
    with pytest.raises(InputError, match="'fast'"):
        op(4)


def test_ops_without_the_forced_implementation_choose_as_usual(op):
    other = Op("other", [Implementation("sole", lambda x: "sole", lambda x: [])])
    with ops.use_impl("even"):
        assert other(1) == "sole"


def test_explain_and_record(op):
    assert ops.explain("parity", 3) == "parity: even: x is odd\nparity: any: chosen"
    assert ops.explain("parity", 4) == "parity: even: chosen\nparity: any: can serve"
    with ops.use_impl("any"):
        assert ops.explain("parity", 4) == "parity: even: can serve\nparity: any: forced"
    with ops.use_impl("even"):
        assert ops.explain("parity", 3) == "parity: even: x is odd\nparity: any: can serve"
    with pytest.raises(InputError, match="must be one of"):
        ops.explain("nonsense")
    with ops.record_impls() as ran:
        op(3), op(4)
    op(5)
    assert ran == [("parity", "any"), ("parity", "even")]


def test_explain_an_implementation_that_is_asked_for(op):
    assert ops.explain("parity", 4, impl="any") == "parity: even: can serve\nparity: any: forced"
    assert ops.explain("parity", 3, impl="even") == "parity: even: x is odd\nparity: any: can serve"
    with pytest.raises(InputError, match=r"parity: impl='fast' must be one of \['even', 'any'\]"):
        ops.explain("parity", 3, impl="fast")


@pytest.mark.parametrize("name", ops.OPS)
def test_explain_without_arguments_lists_what_there_is(name):
    lines = ops.explain(name).splitlines()
    assert len(lines) == len(ops.OPS[name].implementations) > 1
    for implementation, line in zip(ops.OPS[name].implementations, lines, strict=True):
        head, _, what = line.removeprefix(f"{name}: ").partition(": ")
        assert head == implementation.name and len(what) > 10
    assert ops.explain(name, impl="reference").splitlines()[-1].startswith(f"{name}: reference (forced): ")
    with ops.use_impl("reference"):
        assert ops.explain(name).splitlines()[-1].startswith(f"{name}: reference (forced): ")


IDS, X = torch.arange(2), torch.rand(2, 8)
CALLS = {  # of each public function a call with as little as it takes
    "adamw": (*(torch.ones(4) for _ in range(4)), torch.ones(4)),
    "column_sum": (X,),
    "cross_attention": (X[:, None], X[:, None], *(torch.eye(8) for _ in range(4))),
    "geglu": (X,),
    "group_norm": (X[..., None, None], X[0], X[0], 2),
    "layer_norm": (X, X[0], X[0]),
    "mlp_bank": (X, [torch.rand(8, 3, 1)], [torch.rand(8, 3)]),
    "normal": ((2, 3), 0, IDS),
    "projection": (X, X),
    "q_sample": (X, None, IDS, torch.rand(5)),
    "resample": (X[..., None, None], "up"),
    "residual_add": (X[..., None, None], X[..., None, None], X[0]),
    "self_attention": (X[:, None], *(torch.eye(8) for _ in range(4))),
    "step": (X, X, torch.zeros(1, 5)),
    "uniform": ((2, 3), 0, IDS),
}
OPTIONS = {"cross_attention": {"heads": 2}, "self_attention": {"heads": 2}, "q_sample": {"seed": 1}}


@pytest.mark.parametrize("name", CALLS)
def test_explain_takes_the_calls_own_arguments_and_says_what_runs(name):
    args, options = CALLS[name], OPTIONS.get(name, {})
    kept = [t.clone() for t in args if isinstance(t, torch.Tensor)]
    for op in (name, getattr(ops, name)):
        says = ops.explain(op, *args, **options)
        assert all(
            torch.equal(*pair) for pair in zip(kept, [a for a in args if isinstance(a, torch.Tensor)], strict=True)
        )
        with ops.record_impls() as ran:
            getattr(ops, name)(*(a.clone() if isinstance(a, torch.Tensor) else a for a in args), **options)
        assert f"{name}: {ran[-1][1]}: chosen" in says
        assert f"{name}: reference: forced" in ops.explain(op, *args, **options, impl="reference")


def test_explain_refuses_what_the_op_refuses_and_what_is_no_op():
    with pytest.raises(InputError, match="sample_ids is torch.float32"):
        ops.explain(ops.normal, (2, 3), 0, IDS.float())
    for no_op in ("linear", ops.linear, torch.relu):
        with pytest.raises(InputError, match="op '(linear|relu)' must be one of"):
            ops.explain(no_op)
    with pytest.raises(InputError, match="leaves these arguments to PyTorch"):
        ops.explain(ops.linear, X, torch.rand(3, 8))
    assert "uniform: reference: forced" in ops.explain(ops.timesteps, 10, 0, IDS, impl="reference")


def test_each_reason_is_logged_once(op, caplog):
    with caplog.at_level(logging.INFO, "encdiff.ops"):
        op(3), op(5), op(4)
    assert [r.message for r in caplog.records] == ["parity: not even: x is odd"]


def test_dispatch_compiles_to_one_graph():
    x, tokens = torch.randn(2, 9, 8), torch.randn(2, 3, 4)
    weights = [torch.randn(8, 8), torch.randn(8, 4), torch.randn(8, 4), torch.randn(8, 8)]
    compiled = torch.compile(
        lambda x: ops.cross_attention(x, tokens, *weights, heads=2), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(x), ops.cross_attention(x, tokens, *weights, heads=2))
