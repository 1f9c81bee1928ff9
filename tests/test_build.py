"""The build of the native engine: when it happens, how often, what is said when it cannot. No real compiler runs."""

import os
import re
import subprocess
import sys

import pytest
import torch

from encdiff.ops import _build

FAKE_COMPILER = """#!/bin/sh
echo "$@" >> "{log}"
case "$1" in -print-file-name=libstdc++.so.6) echo "$0"; echo a warning >&2; exit;; esac
sleep 0.2
while [ "$1" != -o ]; do shift; done
echo built > "$2"
"""
# What csrc/ may use of PyTorch: read off the headers of torch 2.11, the oldest that is served. Newer ones have more,
# such as STABLE_TORCH_ERROR_CODE_CHECK, so that a build against them proves nothing. Look in 2.11 before adding a name.
STABLE_ABI = {
    "STABLE_TORCH_LIBRARY", "STABLE_TORCH_LIBRARY_FRAGMENT", "STABLE_TORCH_LIBRARY_IMPL", "STD_TORCH_CHECK",
    "TORCH_BOX", "TORCH_ERROR_CODE_CHECK", "aoti_torch_get_current_cuda_stream", "torch::headeronly::ScalarType",
    "torch::stable::Tensor", "torch::stable::accelerator::DeviceGuard", "torch::stable::empty_like",
    "torch::stable::new_empty", "torch::stable::parallel_for",
    "torch/csrc/stable/accelerator.h", "torch/csrc/stable/library.h", "torch/csrc/stable/ops.h",
    "torch/csrc/stable/tensor.h",
}  # fmt: skip
STABLE_NAME = re.compile(
    r"\b(?:(?:STABLE_|STD_)?TORCH_\w+|aoti_torch_\w+|torch_[a-z]\w*(?=\()|torch::\w+(?:::\w+)*)|(?<=<)torch/[\w/]+\.h"
)
FIND = "from encdiff.ops import _build; print(_build.find_or_build(False))"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty cache, a compiler that only notes its calls, and nothing installed."""
    compiler = tmp_path / "c++"
    compiler.write_text(FAKE_COMPILER.format(log=tmp_path / "calls"))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ENCDIFF_CUDA", raising=False)
    monkeypatch.setattr(_build, "installed", lambda: None)
    return tmp_path


def run(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )


def test_two_processes_build_once_and_say_so_in_one_line(place):
    code = FIND.replace("; ", "; _build.installed = lambda: None; ", 1)
    done = [process.communicate(timeout=60) for process in [run(code), run(code)]]
    paths, notices = zip(*done, strict=True)
    assert paths[0] == paths[1] and str(place) in paths[0]
    assert sorted(len(n.splitlines()) for n in notices) == [0, 1], notices
    calls = (place / "calls").read_text().splitlines()
    assert sum("-shared" in call for call in calls) == 1
    library = _build.find_or_build(False)
    assert library.read_text() == "built\n" and sorted(p.name for p in library.parent.iterdir()) == ["_C.so", "lock"]
    assert len((place / "calls").read_text().splitlines()) == len(calls)


def test_the_c_plus_plus_library_is_the_process_s_own(place):
    """A copy of it, as `-static-libstdc++` or a compiler's own habit links it, crashes at the first error message."""
    _build.find_or_build(False)
    link = next(call for call in (place / "calls").read_text().splitlines() if "-shared" in call)
    assert link.endswith(f" {place / 'c++'}")  # what the compiler named


def test_a_failure_is_kept_until_its_note_is_deleted(place, monkeypatch):
    (place / "c++").write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    with pytest.raises(_build.BuildError, match="failure.txt says why"):
        _build.find_or_build(False)
    note = next(place.rglob("failure.txt"))
    assert "no such flag" in note.read_text()
    (place / "c++").write_text(FAKE_COMPILER.format(log=place / "calls"))
    with pytest.raises(_build.BuildError, match="failed before"):
        _build.find_or_build(False)
    note.unlink()
    assert _build.find_or_build(False).exists()


def test_without_a_compiler_the_reference_serves_quietly(tmp_path):
    code = """
from encdiff.ops import _native
_native._build.installed = lambda: None
import torch
from encdiff import ops
x, c = torch.ones(2, 3), torch.ones(2, 5)
print(ops.explain("step", x, x, c, x))
assert ops.step(x, x, c, x).tolist() == [[4.0] * 3] * 2
"""
    process = run(code, PATH=str(tmp_path), CXX="", XDG_CACHE_HOME=str(tmp_path))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.splitlines() == [
        "step: native: the native engine is not built: no C++ compiler on PATH, and CXX names none",
        "step: reference: chosen",
    ]
    assert "encdiff" not in err


NO_HOME = """
import os, pwd, sys

def unknown(uid):  # a container's user, who has no name
    raise KeyError(uid)

pwd.getpwuid = unknown
from pathlib import Path
if "HOME" not in os.environ:
    try:
        sys.exit(str(Path.home()))
    except RuntimeError:
        pass
"""
WITHOUT_CACHE = """
from encdiff.ops import _native
_native._build.installed = lambda: None
import torch
from encdiff import EncDiff, EncDiffConfig, InputError, ops
from encdiff.data import open_dataset
from encdiff.ops import record_impls
from _tiny import TINY

model, images = EncDiff(TINY), torch.rand(2, 3, 16, 16)
with record_impls() as ran:
    model.loss(images, seed=0).backward()
    model.eval().sample(model.encode(images), steps=2, sampler="ddim", eta=1.0)
assert {dict(ran)[op] for op in ("uniform", "q_sample", "normal", "step")} == {"reference"}
x = torch.ones(2, 3)
print(ops.explain("step", x, x, torch.ones(2, 5), x))
try:
    open_dataset("~/3dshapes.h5")
except InputError as error:
    print(str(error)[:40])
"""


def without(*names: str, **given: str) -> dict[str, str]:
    """The environment of a process without these variables, whose Python finds the tests."""
    paths = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    return {k: v for k, v in os.environ.items() if k not in names} | {"PYTHONPATH": paths} | given


@pytest.mark.parametrize("home", [None, "/proc/none"])
def test_without_a_home_folder_every_op_is_served(home, tmp_path):
    environment = without("HOME", "XDG_CACHE_HOME", **({"HOME": home} if home else {}))
    command = [sys.executable, "-c", NO_HOME + WITHOUT_CACHE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, last, data = done.stdout.splitlines()
    why = "[Errno 2] No such file or directory: '/proc/none" if home else "this user has no home folder for a cache; "
    assert first.startswith(f"step: native: the native engine is not built: {why}")
    assert last == "step: reference: chosen" and data.startswith("data '~/3dshapes.h5': not found here")


def test_the_build_says_in_one_line_that_there_is_no_place_for_it():
    code = (
        NO_HOME
        + "from encdiff.ops import _build; _build.installed = lambda: None; sys.argv[1:] = []; sys.exit(_build.main())"
    )
    command = [sys.executable, "-c", code]
    environment = without("HOME", "XDG_CACHE_HOME", ENCDIFF_CUDA="0")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    said = "encdiff: this user has no home folder for a cache; let XDG_CACHE_HOME name a folder\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_what_a_killed_build_left_is_removed(place):
    library = _build.find_or_build(False)
    for name in (".buildx7_2k1ab", f".build{os.getpid()}-abc", f".build{2**22 + 1}-abc"):
        (library.parent / name).mkdir()
        (library.parent / name / "noise.o").write_text("half")
    _build.build(library, False)  # as an install does: others may be building there, too
    left = {path.name for path in library.parent.iterdir()}
    assert left == {"_C.so", "lock", ".buildx7_2k1ab", f".build{os.getpid()}-abc"}
    library.unlink()
    assert _build.find_or_build(False) == library
    assert {path.name for path in library.parent.iterdir()} == {"_C.so", "lock"}


def test_encdiff_cuda(place, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(place))  # where no nvcc is
    assert _build.find_nvcc() is None
    monkeypatch.setenv("ENCDIFF_CUDA", "1")
    with pytest.raises(_build.BuildError, match="no nvcc"):
        _build.find_nvcc()
    (place / "bin").mkdir()
    (place / "bin" / "nvcc").write_text("#!/bin/sh\n")
    (place / "bin" / "nvcc").chmod(0o755)
    assert _build.find_nvcc() == str(place / "bin" / "nvcc")
    monkeypatch.setenv("ENCDIFF_CUDA", "0")
    assert _build.find_nvcc() is None
    monkeypatch.setenv("ENCDIFF_CUDA", "yes")
    with pytest.raises(_build.BuildError, match="must be auto, 0 or 1"):
        _build.find_nvcc()


def test_architectures_are_those_nvcc_knows(monkeypatch):
    monkeypatch.setattr(_build, "run", lambda command: "compute_75\ncompute_80\ncompute_90\n")
    assert _build.targets("nvcc")[1::2] == [
        "arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90",
    ]  # fmt: skip


def test_a_library_of_other_sources_is_not_taken(tmp_path, monkeypatch):
    package, sources = tmp_path / "encdiff", tmp_path / "csrc"
    package.mkdir(), sources.mkdir()
    (package / "ops").mkdir()
    (package / "ops/_build.py").write_text("one")
    (sources / "noise.cpp").write_text("two")
    monkeypatch.setattr(_build, "__file__", str(package / "ops/_build.py"))
    assert _build.installed() is None
    (package / "_C.abi3.so").write_bytes(b"\0encdiff-sources:" + _build.fingerprint().encode() + b"\0")
    assert _build.installed() == package / "_C.abi3.so"
    (sources / "noise.cpp").write_text("three")
    assert _build.installed() is None


def test_ptxas_output_is_read():
    log = """ptxas info    : Compiling entry function '_ZN7encdiff3fooE' for 'sm_90'
ptxas info    : Function properties for _ZN7encdiff3fooE
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 34 registers, used 0 barriers, 420 bytes cmem[0]
"""
    assert list(_build.usages(log)) == [("_ZN7encdiff3fooE", 34, 16, 12)]


def test_the_torch_here_has_the_stable_abi():
    assert _build.find_torch().samefile(os.path.dirname(torch.__file__))


def stable_names(code: str) -> set[str]:
    """What a source uses of PyTorch, comments aside: macros, functions, types and headers."""
    return set(STABLE_NAME.findall(re.sub(r"//.*", "", code)))


def test_names_of_the_stable_abi_are_read():
    code = """#include <torch/csrc/stable/stream.h>
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_current_stream(0, &s));  // not TORCH_BOX
    torch::stable::Tensor y = torch::stable::empty_like(x);"""
    assert stable_names(code) - STABLE_ABI == {
        "torch/csrc/stable/stream.h", "STABLE_TORCH_ERROR_CODE_CHECK", "torch_get_current_stream",
    }  # fmt: skip


def test_the_oldest_torch_has_all_that_is_used_of_the_stable_abi():
    used = {path.name: stable_names(path.read_text()) for path in _build.sources().iterdir()}
    assert len(used["noise.cpp"]) > 10
    assert {name: names - STABLE_ABI for name, names in used.items() if names - STABLE_ABI} == {}
