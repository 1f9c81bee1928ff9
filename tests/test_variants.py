"""Variants of kernels: what an op names for a call is what is checked."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _card import attention, pretend
from _place import interpreted

from encdiff import ops
from encdiff.ops import _families, _self_check
from encdiff.ops._check import TYPES, Draw
from encdiff.ops._families import FAMILIES

pytestmark = interpreted
LAUNCHED = Path(__file__).parent / "_launched.py"


@pytest.fixture
def card(monkeypatch, tmp_path):
    return pretend(monkeypatch, tmp_path)


@pytest.mark.parametrize("form", ["bf16", "autocast"])
def test_a_step_launches_no_code_that_was_not_checked(form):
    """By Triton's own specialisation of each launch's arguments; else a check says nothing of what runs."""
    pytest.importorskip("triton._C.libtriton", reason="needs Triton")
    if not hasattr(sys.modules["triton._C.libtriton"], "native_specialize_impl"):
        pytest.skip("this Triton specialises arguments in Python, which the script does not ask")
    done = subprocess.run([sys.executable, str(LAUNCHED), form], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    count, *unchecked = done.stdout.splitlines()
    assert int(count) > 60 and not unchecked


MODULES = {  # of the ops that name a variant for what they are called with
    "adamw": "_adamw_with", "column_sum": "_column_sum_with", "geglu": "_geglu_with", "group_norm": "_group_norm_with",
    "layer_norm": "_layer_norm_with", "mlp_bank": "_mlp_bank_with", "projection": "_projection_with",
    "resample": "_resample_with", "residual_add": "_residual_add_with",
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_what_is_drawn_for_a_variant_is_of_that_variant(card, monkeypatch, name):
    """Else a check would be of other code than the one that is asked for."""
    asked = []
    monkeypatch.setattr(_self_check, "_reasons", lambda family, variant, *_: asked.append((family, variant)) or [])
    family, reasons = FAMILIES[name], sys.modules[f"encdiff.ops.{name}"]._triton_reasons
    for variant in family.variants():
        with_input = {"with_input": True} if name in ("group_norm", "layer_norm") and variant[-1] else {}
        run = getattr(_families, MODULES[name])(lambda *a, w=with_input, **o: reasons(*a, **o, **w) and None)
        run(family.make(Draw("0"), *variant), *variant)
        assert asked.pop() == (name, variant)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_size_has_a_variant_that_can_be_checked(card, monkeypatch, dtype):
    """Sizes at random: what an op names can be drawn, with the tile that the op takes."""
    from encdiff.kernels.cross_attention import plan
    from encdiff.kernels.group_norm import Tile

    asked = []
    monkeypatch.setattr(_self_check, "_reasons", lambda family, variant, *_: asked.append((family, variant)) or [])
    of, number = TYPES[dtype], torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(of)

    def upto(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=number))

    for _ in range(40):
        L, D, G, N, H, d = upto(40), upto(64), upto(9), upto(400), upto(4), upto(32)
        C, heads = D * G, H * d
        ops.group_norm(x := draw(2, C, L, 1), draw(C), draw(C), G, impl="reference")
        sys.modules["encdiff.ops.group_norm"]._triton_reasons(x, draw(C), draw(C), G, silu=True)
        (_, variant), size = asked[-1], asked[-1][1][2:5]
        assert Tile.of(*size) == Tile.of(L, C, G), variant
        sys.modules["encdiff.ops.self_attention"]._triton_reasons(
            draw(1, L * 9, C), draw(heads, C), draw(heads, C), draw(heads, C), draw(C, heads), heads=H
        )
        weights = draw(heads, C), draw(heads, D), draw(heads, D), draw(C, heads)
        sys.modules["encdiff.ops.cross_attention"]._triton_reasons(draw(2, L, C), draw(2, N, D), *weights, heads=H)
        sys.modules["encdiff.ops.column_sum"]._triton_reasons(draw(L * 100, C), of)
        sys.modules["encdiff.ops.geglu"]._triton_reasons(draw(L, 2 * C))
        sys.modules["encdiff.ops.layer_norm"]._triton_reasons(draw(L, C), draw(C), draw(C))
    assert {family for family, _ in asked} >= {"group_norm", "self_attention", "column_sum", "geglu", "layer_norm"}
    for family, variant in dict.fromkeys(asked):
        inputs = FAMILIES[family].make(Draw("0"), *variant)
        assert inputs and all(isinstance(part, str | int | bool) for part in variant)
        if family == "cross_attention_heads":
            assert variant[1] <= plan.head_width_limit(of.itemsize)


WITH_TRITON = [name for name, op in ops.OPS.items() if any(i.name == "triton" for i in op.implementations)]


@pytest.mark.parametrize("name", WITH_TRITON)
def test_every_op_with_a_triton_kernel_is_checked(name):
    families = {"cross_attention": ["cross_attention_folded", "cross_attention_heads"]}
    assert set(families.get(name, [name])) <= set(FAMILIES), "see CONTRIBUTING.md: adding an op"


@pytest.mark.parametrize("name", FAMILIES)
def test_variants_are_told_apart(name):
    variants = list(FAMILIES[name].variants())
    assert len(variants) == len(set(variants)) > 3


class TestAttentionVariants:
    """Sizes and options of calls of the paper's layers, as the ops name them."""

    def asked(self, monkeypatch, call) -> list[tuple]:
        found = []
        monkeypatch.setattr(_self_check, "_reasons", lambda family, variant, *_: found.append((family, *variant)) or [])
        call()
        return found

    def test_cross_attention(self, card, monkeypatch):
        t = {n: v.float() for n, v in attention().items()} | {"b_o": torch.zeros(64)}
        norm = {"norm_weight": torch.ones(64), "norm_bias": torch.zeros(64), "residual": True}

        def call(**changes):
            with torch.autocast("cpu", torch.bfloat16):
                ops.cross_attention(**t | norm | changes, heads=8, impl="triton")

        folded = ("cross_attention_folded", "float32", "bfloat16", "float32", 64, True, True)
        assert self.asked(monkeypatch, call)[0] == (*folded, "none", "none")
        bias = {"token_bias": torch.zeros(2, 20), "maps": "mean"}
        assert self.asked(monkeypatch, lambda: call(**bias))[0] == (*folded, "given", "mean")
        many = {"context": torch.randn(2, 100, 16)}
        assert self.asked(monkeypatch, lambda: call(**many))[0] == (
            "cross_attention_heads", "bfloat16", 8, 100, False, "none", False,
        )  # fmt: skip
        in_turn = {"x": torch.randn(2, 9, 64), "context": torch.randn(2, 129, 16)}
        assert self.asked(monkeypatch, lambda: call(**in_turn))[0][3] == 150
        few = {"x": torch.randn(2, 9, 64), "context": torch.randn(2, 32, 16)}
        found = self.asked(monkeypatch, lambda: call(**few))[0]
        assert found[0] == "cross_attention_folded" or found[1:5] == ("bfloat16", 8, 20, True)

    def test_self_attention(self, card, monkeypatch):
        x, w = torch.randn(2, 256, 60), [torch.randn(60, 60) for _ in range(4)]
        found = self.asked(monkeypatch, lambda: ops.self_attention(x, *w, heads=6, impl="triton"))
        assert found[0] == ("self_attention", "float32", 16, 256), "heads of 10 are filled up to 16"
