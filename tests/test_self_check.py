"""Kernels are checked on a card at their first use. The card is a fake one: there they are interpreted."""

import json
import multiprocessing
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from _card import CARD, attention, forget, pretend
from _place import interpreted
from torch.utils.checkpoint import checkpoint

from encdiff import ops
from encdiff.errors import InputError
from encdiff.ops import _self_check
from encdiff.ops._check import check
from encdiff.ops.cross_attention_folded import cross_attention_folded, fold

pytestmark = interpreted


@pytest.fixture
def card(monkeypatch, tmp_path):
    return pretend(monkeypatch, tmp_path)


@pytest.fixture
def wrong_layer_norm(monkeypatch):
    """Its backward kernel scales every gradient by 1.02."""
    from encdiff.kernels import layer_norm as kernels

    launch = kernels._launch_backward
    monkeypatch.setattr(kernels, "_launch_backward", lambda *a: tuple(1.02 * g for g in launch(*a)))


def layer(grad: bool = True) -> list[torch.Tensor]:
    return [torch.randn(5, 64, requires_grad=grad), torch.ones(64, requires_grad=grad), torch.zeros(64)]


def only_file(folder):
    (found,) = (folder / "encdiff" / "self-check").glob("*.json")
    return found


def test_without_a_home_folder_the_verdict_holds_for_the_process(card, capsys, monkeypatch, wrong_layer_norm):
    def unknown(_):
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", unknown)  # a container's user, who has no name
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    for _ in range(2):
        with pytest.raises(InputError, match="it failed its check on this card"):
            ops.layer_norm(*layer(), impl="triton")
    assert card == {"layer_norm": 1}
    said = capsys.readouterr().err
    assert said.count("verdicts on kernels cannot be kept (this user has no home folder") == 1


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
    assert kept["card"] == CARD and kept["checks"] == {"layer_norm float32 float32 64 True False gradients": []}


def test_a_wrong_kernel_is_a_reason_with_its_figure(card, wrong_layer_norm, capsys, monkeypatch):
    with pytest.raises(InputError, match="cannot serve this input: it failed its check on this card: dx is off by"):
        ops.layer_norm(*layer(), impl="triton")
    assert "layer_norm float32 float32 64 True False gradients is wrong on Fake 9000" in capsys.readouterr().err
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


def test_a_kernel_that_does_not_compile_is_a_reason(card, monkeypatch, capsys):
    class OutOfResources(Exception):
        """As Triton's."""

    def fail(error):
        def launch(*_):
            raise error

        return launch

    full = OSError("No space left on device")
    for error, again in ((full, 2), (OutOfResources("shared memory\nRequired: 525312"), 1)):
        card.clear()
        forget(monkeypatch)
        monkeypatch.setattr("encdiff.kernels.layer_norm._launch_forward", fail(error))
        for _ in range(2):
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            with pytest.raises(InputError, match=said.replace("(", "\\(")):
                ops.layer_norm(*layer(), impl="triton")
            assert said in capsys.readouterr().err, "in every process"
            forget(monkeypatch)
        assert card == {"layer_norm": again}, "what may pass is not kept"


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
    folded = fold(*(tensors[n] for n in ("context", "w_q", "w_k", "w_v", "w_o")), heads=8)
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
        assert _self_check._reasons("layer_norm", ("float32", "float32", 64, True, False), True, 0) == []
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


@pytest.mark.parametrize(
    "name", ["self_attention", "cross_attention", "group_norm", "geglu", "layer_norm", "column_sum"]
)
def test_no_graph_break_with_sizes_that_are_symbols(card, name):
    square, narrow = (torch.nn.Parameter(torch.randn(64, n) / n**0.5, requires_grad=False) for n in (64, 16))
    context, ones = torch.randn(2, 20, 16), torch.nn.Parameter(torch.ones(64), requires_grad=False)
    run, sizes = {
        "self_attention": (lambda x: ops.self_attention(x, *[square] * 4, heads=8, impl="triton"), (16, 20, 64)),
        "cross_attention": (
            lambda x: ops.cross_attention(x, context, square, narrow, narrow, square, heads=8, impl="triton"), (17, 40),
        ),
        "group_norm": (lambda x: ops.group_norm(x.mT[..., None], ones, ones, 32, impl="triton"), (4, 9, 300)),
        "geglu": (lambda x: ops.geglu(x, impl="triton"), (3, 5)),
        "layer_norm": (lambda x: ops.layer_norm(x, ones, ones, impl="triton"), (3, 5)),
        "column_sum": (lambda x: ops.column_sum(x[0], impl="triton"), (3, 900, 3000)),
    }[name]  # fmt: skip
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for size in sizes:
        x = torch.randn(2, size, 64)
        torch._dynamo.maybe_mark_dynamic(x, 1)
        torch.testing.assert_close(compiled(x), run(x), rtol=1e-4, atol=1e-4)
    assert sum(card.values()) >= 1


def test_nothing_is_checked_while_a_graph_is_captured(card, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(InputError, match="not checked on this card yet: call it once before a graph is captured"):
        ops.layer_norm(*layer(), impl="triton")
    assert "not checked on this card yet" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    ops.layer_norm(*layer(), impl="triton")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ops.layer_norm(*layer(), impl="triton")
    forget(monkeypatch)
    ops.layer_norm(*layer(), impl="triton")
    assert card == {"layer_norm": 1}, "a verdict that is kept serves in a capture, too"


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
    assert list(json.loads(path.read_text())["checks"]) == ["layer_norm float32 float32 64 True False gradients"]


def test_verdicts_are_of_every_source(monkeypatch, tmp_path):
    """A change of a kernel in a folder asks for a new check, too."""
    import encdiff.kernels

    folder, before = tmp_path / "kernels", _self_check.sources.__wrapped__()
    shutil.copytree(Path(encdiff.kernels.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(encdiff.kernels, "__file__", str(folder / "__init__.py"))
    assert _self_check.sources.__wrapped__() == before
    (folder / "cross_attention" / "folded.py").open("a").write("# changed")
    assert _self_check.sources.__wrapped__() != before


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


def test_a_device_without_memory_is_asked_by_the_next_process(card, monkeypatch, capsys):
    def fail(*_):
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr(_self_check, "check", fail)
    for _ in range(2):
        with pytest.raises(InputError, match="the device is out of memory"):
            ops.layer_norm(*layer(), impl="triton")
    assert capsys.readouterr().err.count("out of memory") == 1
    monkeypatch.setattr(_self_check, "check", check)
    forget(monkeypatch)
    ops.layer_norm(*layer(), impl="triton")


def test_a_check_within_a_backward_does_not_wait_for_another_thread(card, monkeypatch):
    """On a GPU there is one thread for all backwards."""
    threads = []
    monkeypatch.setattr(_self_check, "check", lambda *a: threads.append(threading.current_thread()) or check(*a))
    x, *parameters = layer()
    y = checkpoint(lambda x: ops.layer_norm(x, *parameters, impl="triton"), x, use_reentrant=True)
    assert [t is threading.current_thread() for t in threads] == [False], "forward, without gradients"
    y.sum().backward()
    assert [t is threading.current_thread() for t in threads] == [False, True]
    assert list(_self_check._known.values()) == [[], []]


def test_a_kernel_that_breaks_the_device_is_noted(card, monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("encdiff.kernels.layer_norm._launch_forward", fail)
    for module in ("encdiff.ops._check", "encdiff.ops._self_check"):
        monkeypatch.setattr(sys.modules[module], "is_lost", lambda device: True)
    with pytest.raises(RuntimeError, match="layer_norm .* broke the work on Fake 9000 .* illegal .* start again"):
        ops.layer_norm(*layer(), impl="triton")
    forget(monkeypatch)
    with pytest.raises(InputError, match="illegal memory access"):
        ops.layer_norm(*layer(), impl="triton")
    assert card == {"layer_norm": 1}


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
