"""Which benchmarks run by default and with --all, with and without a GPU; none is run here."""

import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

from bench.cases import cases, check, run_of

ROOT = Path(__file__).parent.parent
MODELS = {"bench_unet", "bench_train_step", "bench_sampling"}
OPS = {path.stem for path in (ROOT / "bench").glob("bench_*.py")} - MODELS
KINDS = {"CPU": (False,), "GPU": (True,), "CPU, all": (False, "--all")}  # whether there is a GPU, options of pytest
# a process for each, forked once what takes seconds to import is there
COLLECT = f"""
import diffusers, os, pytest, sys, torch
for gpu, *options in {list(KINDS.values())}:
    if not os.fork():
        torch.cuda.is_available = lambda: gpu
        code = pytest.main(["bench", "--collect-only", "-q", "-p", "no:cacheprovider", *options])
        sys.stdout.flush()
        os._exit(code)
    if os.wait()[1]:
        sys.exit(1)
    print("end of one", flush=True)
"""


@cache
def collected() -> dict[str, list[str]]:
    """Names of the benchmarks as pytest collects them in each of the kinds."""
    done = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = done.stdout.split("end of one\n")[:-1]
    names = [[line.removeprefix("bench/") for line in part.splitlines() if "::" in line] for part in parts]
    return dict(zip(KINDS, names, strict=True))


@pytest.mark.parametrize("gpu", [False, True], ids=["CPU", "GPU"])
def test_by_default_only_what_decides_runs(gpu):
    default = collected()["GPU" if gpu else "CPU"]
    files = Counter(name.split(".py::")[0] for name in default)
    assert files.keys() == OPS | MODELS  # of each at least one
    assert 40 <= sum(files[op] for op in OPS) <= 74 and sum(files[model] for model in MODELS) <= 24
    # ours beside the stock forms, at one dtype of ops
    for op in OPS - {"bench_noise", "bench_loader"}:
        names = [name for name in default if name.startswith(f"{op}.py")]
        assert any("published" in name or "torch" in name for name in names)
        assert not gpu or any("-ours" in name for name in names)
        other = "torch.float32" if gpu else "torch.bfloat16"
        assert not any(other in name for name in names)


def test_all_of_them_are_many_more():
    default, everything = collected()["CPU"], collected()["CPU, all"]
    assert set(default) < set(everything) and len(everything) > 3 * len(default)


def test_what_does_not_decide_is_marked():
    mark = cases("a, b", [(1, 2), (2, 1)], lambda a, b: a < b)
    assert [[m.name for m in case.marks] for case in mark.args[1]] == [[], ["rest"]]


def test_a_run_is_without_gradients_or_with_all_of_them():
    x, w = torch.randn(3, 2, requires_grad=True), torch.randn(2, requires_grad=True)
    y = run_of("forward", lambda x: x * w, [x], [w])()
    assert not y.requires_grad and torch.equal(y, x * w)
    dx, dw = run_of("forward_backward", lambda x: x * w, [x], [w])()
    assert dx.shape == x.shape and dw.shape == w.shape
    assert torch.allclose((dx / w * x).sum(0), dw)


def test_a_wrong_output_or_gradient_is_not_timed():
    x = torch.randn(4, requires_grad=True)
    check(torch.sin, torch.sin, [x], 1e-5)
    with pytest.raises(AssertionError, match="output"):
        check(torch.sin, lambda x: 1.01 * x.sin(), [x], 1e-5)
    with pytest.raises(AssertionError, match="gradient of input 1"):
        check(lambda x: x.detach() + 0.5 * (x - x.detach()), lambda x: x.clone(), [x], 1e-5)
