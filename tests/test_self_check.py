"""Kernels are checked on a card at their first use. The card is a fake one: there they are interpreted."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections import Counter

import pytest
import torch
from _place import interpreted

from encdiff import ops
from encdiff.errors import InputError
from encdiff.ops import _families, _self_check
from encdiff.ops._check import TYPES, Draw, check
from encdiff.ops._families import FAMILIES
from encdiff.ops.cross_attention_folded import cross_attention_folded, fold_matrices, keep

pytestmark = interpreted
CARD = "Fake 9000 (sm_90)"


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card on which every tensor lies; counts the checks that are made on it."""
    made = Counter()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_self_check, "is_asked", lambda x: os.environ.get("ENCDIFF_SELF_CHECK") != "0")
    monkeypatch.setattr(_self_check, "is_there", lambda: True)
    monkeypatch.setattr(_self_check, "place", lambda device: torch.device("cpu"))
    monkeypatch.setattr(_self_check, "card", lambda device: CARD)
    monkeypatch.setattr(_self_check, "check", lambda f, v, g, d: made.update([f.name]) or check(f, v, g, d))
    forget(monkeypatch)
    return made


def forget(monkeypatch) -> None:
    """As a new process begins."""
    monkeypatch.setattr(_self_check, "_known", {})
    monkeypatch.setattr(_self_check, "_said", set())


@pytest.fixture
def wrong_layer_norm(monkeypatch):
    """Its backward kernel scales every gradient by 1.02."""
    from encdiff.kernels import layer_norm as kernels

    launch = kernels._launch_backward
    monkeypatch.setattr(kernels, "_launch_backward", lambda *a: tuple(1.02 * g for g in launch(*a)))


def layer(grad: bool = True) -> list[torch.Tensor]:
    return [torch.randn(5, 64, requires_grad=grad), torch.ones(64, requires_grad=grad), torch.zeros(64)]


def attention() -> dict[str, torch.Tensor]:
    """Of a size that takes the folded route."""
    shapes = {"x": (2, 256, 64), "context": (2, 20, 16)}
    shapes |= {"w_q": (64, 64), "w_k": (64, 16), "w_v": (64, 16), "w_o": (64, 64)}
    return {n: (torch.randn(s) / (s[-1] ** 0.5 if n[0] == "w" else 1)).bfloat16() for n, s in shapes.items()}


def only_file(folder):
    (found,) = (folder / "encdiff" / "self-check").glob("*.json")
    return found


def test_a_right_kernel_serves_and_is_checked_once(card, tmp_path, capsys, monkeypatch):
    for _ in range(3):
        ops.layer_norm(*layer(), impl="triton")
    assert card == {"layer_norm": 1}
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and CARD in said and str(tmp_path) in said
    forget(monkeypatch)
    ops.layer_norm(*layer(), impl="triton")
    ops.layer_norm(*layer(grad=False), impl="triton")  # a check with gradients is one without
    assert card == {"layer_norm": 1} and capsys.readouterr().err == ""
    kept = json.loads(only_file(tmp_path).read_text())
    assert kept["card"] == CARD and kept["checks"] == {"layer_norm float32 float32 64 True gradients": []}


def test_a_wrong_kernel_is_a_reason_with_its_figure(card, wrong_layer_norm, capsys, monkeypatch):
    with pytest.raises(InputError, match="cannot serve this input: it failed its check on this card: dx is off by"):
        ops.layer_norm(*layer(), impl="triton")
    assert "layer_norm float32 float32 64 True gradients is wrong on Fake 9000" in capsys.readouterr().err
    # as on a GPU, where there is no doubt
    monkeypatch.setattr(sys.modules["encdiff.ops.layer_norm"], "interpreted", lambda x: [])
    with ops.record_impls() as ran:
        y = ops.layer_norm(*(tensors := layer()))
    assert ran == [("layer_norm", "native")]
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(tensors[0], (64,)))
    assert "triton: it failed its check" in ops.explain("layer_norm", *tensors)
    ops.layer_norm(*layer(grad=False), impl="triton")  # forward it is right
    forget(monkeypatch)
    assert "triton: it failed its check" in ops.explain("layer_norm", *tensors)
    assert card == {"layer_norm": 2}, "a new process learns it from the file"


def test_a_kernel_that_does_not_compile_is_a_reason(card, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of resource: shared memory\nRequired: 525312")

    monkeypatch.setattr("encdiff.kernels.layer_norm._launch_forward", fail)
    with pytest.raises(InputError, match="RuntimeError: out of resource: shared memory Required: 525312"):
        ops.layer_norm(*layer(), impl="triton")


def test_a_route_that_fails_leaves_the_other(card, monkeypatch):
    from encdiff.kernels import cross_attention as kernels

    fused = kernels.cross_attention_folded

    def wrong(*args):
        y, p = fused(*args)
        return y * 1.1, p

    tensors = attention()
    expected = ops.cross_attention(**tensors, heads=8, impl="reference")
    taken = []
    by_heads = kernels.cross_attention_heads
    monkeypatch.setattr(kernels, "cross_attention_heads", lambda *a: taken.append("heads") or by_heads(*a))
    ops.cross_attention(**tensors, heads=8, impl="triton")
    assert taken == []
    monkeypatch.setattr(kernels, "cross_attention_folded", wrong)
    _self_check._known.clear()
    _self_check.file(0).unlink()
    actual = ops.cross_attention(**tensors, heads=8, impl="triton")
    assert (actual - expected).norm() < 0.02 * expected.norm()
    assert taken == ["heads"] * 2  # its check, and the call
    folded = fold_matrices(*(tensors[n] for n in ("context", "w_q", "w_k", "w_v", "w_o")), heads=8)
    with pytest.raises(InputError, match="y0 is off by 0.09"):
        cross_attention_folded(tensors["x"], folded, impl="triton")


def test_a_bias_gradient_whose_kernel_fails_is_pytorchs(card, monkeypatch):
    monkeypatch.setattr("encdiff.kernels.column_sum._launch", lambda x, y, rows, tile: y.zero_())
    x, weight, bias = torch.randn(7, 8), torch.randn(16, 8), torch.randn(16, requires_grad=True)
    y = ops.linear(x, weight, bias, impl="triton")
    y.sum().backward()
    assert card == {"column_sum": 1}
    torch.testing.assert_close(bias.grad, torch.full((16,), 7.0))


def test_the_callers_modes_do_not_reach_the_check(card):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        state = torch.get_rng_state()
        assert _self_check._reasons("layer_norm", ("float32", "float32", 64, True), True, 0) == []
        assert _self_check._reasons("mlp_bank", ("float32", "float32", 64, 16, "elu"), True, 0) == []
        assert torch.equal(state, torch.get_rng_state()), "random numbers are the caller's"


def test_no_graph_break(card):
    """The verdict is a constant of the compiled graph, whether or not it was known before."""
    x, w, b = torch.randn(2, 16, 8, 8), torch.ones(16), torch.zeros(16)
    compiled = torch.compile(lambda x: ops.group_norm(x, w, b, 8, impl="triton"), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), ops.group_norm(x, w, b, 8, impl="reference"))
    assert card == {"group_norm": 1}
    tensors = attention()

    def attend(x):
        return ops.cross_attention(**tensors | {"x": x}, heads=8, impl="triton")

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tensors["x"]), attend(tensors["x"]))
    assert card["cross_attention_folded"] == 1


def test_nothing_is_checked_while_a_graph_is_captured(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(InputError, match="not checked on this card yet: call it once before a graph is captured"):
        ops.layer_norm(*layer(), impl="triton")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    ops.layer_norm(*layer(), impl="triton")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ops.layer_norm(*layer(), impl="triton")
    assert card == {"layer_norm": 1}


def test_the_environment_leaves_it_out(card, wrong_layer_norm, monkeypatch):
    monkeypatch.setenv("ENCDIFF_SELF_CHECK", "0")
    ops.layer_norm(*layer(), impl="triton")
    assert not card
    monkeypatch.setenv("ENCDIFF_SELF_CHECK", "yes")
    with pytest.raises(InputError, match="ENCDIFF_SELF_CHECK is 'yes', must be 0 or 1"):
        ops.layer_norm(*layer(), impl="triton")


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "[" * 100_000, '{"checks": {"a": 1}}', "\x00\xff"],
    ids=["empty", "cut", "list", "deep", "types", "bytes"],
)
def test_a_damaged_file_is_said_and_made_anew(card, tmp_path, capsys, monkeypatch, damage):
    ops.layer_norm(*layer(), impl="triton")
    path = only_file(tmp_path)
    path.write_bytes(damage.encode("latin1"))
    forget(monkeypatch)
    capsys.readouterr()
    ops.layer_norm(*layer(), impl="triton")
    assert card == {"layer_norm": 2}
    assert f"{path} cannot be used" in capsys.readouterr().err.splitlines()[0]
    assert list(json.loads(path.read_text())["checks"]) == ["layer_norm float32 float32 64 True gradients"]


def test_a_file_of_another_card_is_not_used(card, tmp_path, capsys, monkeypatch):
    ops.layer_norm(*layer(), impl="triton")
    path = only_file(tmp_path)
    path.write_text(path.read_text().replace(CARD, "Fake 100"))
    forget(monkeypatch)
    ops.layer_norm(*layer(), impl="triton")
    assert card == {"layer_norm": 2} and "'card': 'Fake 100'" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_said_once(card, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        ops.layer_norm(*layer(), impl="triton")
        ops.geglu(torch.randn(3, 8), impl="triton")
    assert card == {"layer_norm": 1, "geglu": 1}
    assert [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line][1:] == []


def test_a_device_without_memory_is_asked_again(card, monkeypatch):
    def fail(*_):
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr(_self_check, "check", fail)
    with pytest.raises(InputError, match="not checked: the device is out of memory"):
        ops.layer_norm(*layer(), impl="triton")
    monkeypatch.setattr(_self_check, "check", check)
    ops.layer_norm(*layer(), impl="triton")


def test_threads_and_processes_keep_each_others_verdicts(card, tmp_path):
    """Eight at once, each with a verdict of its own."""
    from encdiff.ops._check import Finding

    def keep(n: int) -> None:
        _self_check.keep(0, [Finding("geglu", ("float32", n), True, {}, [])])

    _self_check.identity(0)
    started = [multiprocessing.get_context("fork").Process(target=keep, args=(n,)) for n in range(4)]
    started += [threading.Thread(target=keep, args=(n,)) for n in range(4, 8)]
    for task in started:
        task.start()
    for task in started:
        task.join()
    checks = json.loads(only_file(tmp_path).read_text())["checks"]
    assert sorted(checks) == [f"geglu float32 {n} gradients" for n in range(8)]
    assert [p.suffix for p in only_file(tmp_path).parent.iterdir() if p.suffix not in (".json", ".lock")] == []


def test_fake_tensors_ask_for_no_check():
    """Launches are counted on fake CUDA tensors where there is no GPU."""
    code = (
        "import torch; from torch._subclasses.fake_tensor import FakeTensorMode; from encdiff.ops import _self_check\n"
        "with FakeTensorMode(): x = torch.empty(3, device='cuda')\n"
        "print(_self_check.reasons('geglu', x, lambda: ('float32', 64)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


MODULES = {  # of the ops that name a variant for what they are called with
    "adamw": "_adamw_with", "column_sum": "_column_sum_with", "geglu": "_geglu_with", "group_norm": "_group_norm_with",
    "layer_norm": "_layer_norm_with", "mlp_bank": "_mlp_bank_with",
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_what_is_drawn_for_a_variant_is_of_that_variant(card, monkeypatch, name):
    """Else a check would be of other code than the one that is asked for."""
    asked = []
    monkeypatch.setattr(_self_check, "_reasons", lambda family, variant, *_: asked.append((family, variant)) or [])
    family, reasons = FAMILIES[name], sys.modules[f"encdiff.ops.{name}"]._triton_reasons
    for variant in family.variants():
        with_input = {"with_input": True} if name == "group_norm" and variant[-1] else {}
        run = getattr(_families, MODULES[name])(lambda *a, w=with_input, **o: reasons(*a, **o, **w) and None)
        run(family.make(Draw("0"), *variant), *variant)
        assert asked.pop() == (name, variant)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_size_has_a_variant_that_can_be_checked(card, monkeypatch, dtype):
    """Sizes at random: what an op names can be drawn, with the tile that the op takes."""
    from encdiff.kernels import _cross_attention_plan as plan
    from encdiff.kernels.group_norm import Tile

    asked = []
    monkeypatch.setattr(_self_check, "_reasons", lambda family, variant, *_: asked.append((family, variant)) or [])
    of, number = TYPES[dtype], torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(of)

    def upto(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=number))

    for _ in range(40):
        L, D, G, N, H, d = upto(40), upto(64), upto(9), upto(40), upto(4), upto(32)
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
        if family == "cross_attention_heads":  # the tile's facts
            assert variant[1] <= plan.head_width_limit(100 if variant[2] else 20, of.itemsize)


WITH_TRITON = [name for name, op in ops.OPS.items() if any(i.name == "triton" for i in op.implementations)]


@pytest.mark.parametrize("name", WITH_TRITON)
def test_every_op_with_a_triton_kernel_is_checked(name):
    families = {"cross_attention": ["cross_attention_folded", "cross_attention_heads"]}
    families["cross_attention_folded"] = ["cross_attention_folded", "cross_attention_kept"]
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

        folded = ("cross_attention_folded", "float32", "bfloat16", 64, True, True)
        assert self.asked(monkeypatch, call)[0] == (*folded, False, "none")
        bias = {"token_bias": torch.zeros(2, 20), "maps": "mean"}
        assert self.asked(monkeypatch, lambda: call(**bias))[0] == (*folded, True, "mean")
        many = {"context": torch.randn(2, 100, 16)}
        assert self.asked(monkeypatch, lambda: call(**many))[0] == (
            "cross_attention_heads", "bfloat16", 8, True, False, False, False,
        )  # fmt: skip
        few = {"x": torch.randn(2, 9, 64), "context": torch.randn(2, 32, 16)}
        found = self.asked(monkeypatch, lambda: call(**few))[0]
        assert found[0] == "cross_attention_folded" or found[1:5] == ("bfloat16", 8, False, True)

    def test_self_attention(self, card, monkeypatch):
        x, w = torch.randn(2, 256, 60), [torch.randn(60, 60) for _ in range(4)]
        found = self.asked(monkeypatch, lambda: ops.self_attention(x, *w, heads=6, impl="triton"))
        assert found[0] == ("self_attention", "float32", 16, 256), "heads of 10 are filled up to 16"

    def test_kept(self, card, monkeypatch):
        width, C = 32, 256
        context, w = torch.randn(2, 20, 16), [torch.randn(C, n) for n in (C, 16, 16, C)]
        with torch.autocast("cpu", torch.bfloat16):
            kept = keep(context, *w, heads=C // width)
            x = torch.randn(2, 16, C)
            found = self.asked(monkeypatch, lambda: cross_attention_folded(x, kept, impl="triton"))
        assert found == [("cross_attention_kept", "float32", "bfloat16", C, width, 9, False, False, False, "none")]
