"""The compile gate: what it accepts and what it refuses. It compiles, so it runs outside the interpreter."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from encdiff.kernels import _gate
from encdiff.kernels._gate import Row

KERNELS = """
import triton
import triton.language as tl

from encdiff.kernels._gate import GateCase, examine, gate_signature


@triton.jit
def product(p_x, p_y, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(p_x + o)
    tl.store(p_y + o, tl.dot(x, x, input_precision="ieee"))


@triton.jit
def unknown(p_x, p_y, N: tl.constexpr):
    tl.store(p_y, nonsense)


def case(name, kernel, dtype, N, num_warps):
    signature = gate_signature(kernel, {"p_x": dtype, "p_y": "*fp32"}, {"N": N})
    return GateCase(name, kernel, signature, {"N": N}, num_warps)


print(examine(case("fits", product, "*bf16", 64, 4), 90).failure)
print(examine(case("spills", product, "*bf16", 128, 1), 80).failure)
print(examine(case("no tensor core", product, "*fp32", 16, 4), 80).failure)
print(examine(case("no kernel", unknown, "*fp32", 16, 4), 80).failure)
"""


def test_what_compiles_badly_fails(tmp_path):
    script = tmp_path / "kernels_to_examine.py"
    script.write_text(KERNELS)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    fits, spills, scalar, unknown = done.stdout.split("\n", 3)
    assert fits == ""
    assert spills.startswith("spills: stack ")
    assert scalar == "no tensor-core instruction"
    assert "nonsense" in unknown


@pytest.mark.parametrize(
    "row, tensor_cores, spills, expected",
    [
        (Row("k", 90, registers=255, shared=227 * 1024, tensor_cores="wgmma.mma_async"), True, 0, []),
        (Row("k", 80, shared=163 * 1024 + 1), False, 0, ["166913 bytes of shared memory of 166912"]),
        (Row("k", 80, stack=8), False, 0, ["spills: stack 8, local 0 bytes"]),
        (Row("k", 80, stack=8), False, 8, []),
        (Row("k", 80, stack=16), False, 8, ["spills: stack 16, local 0 bytes"]),
        (Row("k", 80, local=16), False, 16, ["spills: stack 0, local 16 bytes"]),
        (Row("k", 100), True, 0, ["no tensor-core instruction"]),
    ],
)
def test_failures(row, tensor_cores, spills, expected):
    case = _gate.GateCase(row.name, None, {}, {}, tensor_cores=tensor_cores, spills=spills)
    assert _gate.failures(row, case) == expected


def test_every_kernel_module_lists_its_configurations():
    for module in _gate.modules():
        cases = list(_gate.cases(module))
        assert cases, module
        assert len({case.name for case in cases}) == len(cases), f"{module}: two cases of one name"


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({}, [(0, (80, 90, 100)), (1, (80, 90, 100)), (2, (80, 90, 100))]),
        ({"brief": True}, [(0, (90,)), (2, (90,))]),
        ({"hopper": True}, [(0, (80, 90, 100)), (1, (90,)), (2, (80, 90, 100))]),
    ],
)
def test_which_cases_are_compiled_for_which_cards(monkeypatch, flags, expected):
    """Two cases of one kernel and one of another; brief: the first of each, hopper: all of them for sm_90."""

    class Here:
        """A pool whose work is done where it is asked for."""

        def __init__(self, *_):
            pass

        __enter__, __exit__ = lambda self: self, lambda *_: None
        map = staticmethod(map)

    kernels = [SimpleNamespace(__name__=name) for name in "aab"]
    monkeypatch.setattr(_gate, "cases", lambda _: iter([_gate.GateCase(k.__name__, k, {}, {}) for k in kernels]))
    monkeypatch.setattr(_gate, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(_gate, "_examine_nth", lambda module, n, targets: [(n, targets)])
    assert list(_gate.rows(["any"], **flags)) == expected


@pytest.mark.parametrize("name", ["--hoper", "gelu"])
def test_what_is_no_module_and_no_option_is_refused(capsys, monkeypatch, name):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which it takes away from its process
    assert _gate.main([name]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"gate: no module {name!r}, must be among adamw, ") and said.count("\n") == 1
