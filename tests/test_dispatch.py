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
