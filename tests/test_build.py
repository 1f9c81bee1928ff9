"""The build of the native engine: when it happens, how often, what is said when it cannot. No real compiler runs."""

import fcntl
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from encdiff.ops import _build

FAKE_COMPILER = """#!/bin/sh
echo "$@" >> "{log}"
case "$1" in -print-file-name=libstdc++.so.6) echo "$0"; echo a warning >&2; exit;;
    --version) cat "{log}.version"; exit;; esac
sleep 0.2
while [ "$1" != -c ] && [ "$1" != -o ]; do shift; done
if [ "$1" = -c ]; then
    echo "$4: $2" $(sed -n 's|#include "\\(.*\\)"|csrc/\\1|p' "$2") > "$4.d"
    echo $$ >> "{log}.pids"
    echo half > "$4"
    while [ -e "{log}.wait" ]; do sleep 0.05; done
    echo built > "$4"
else
    cat *.o > "$2"
fi
"""
# by its path, as setup.py: without torch a process is there at once
BUILD = f"import sys; sys.path.insert(0, {os.path.dirname(_build.__file__)!r}); import _build; "
BUILD += "_build.installed = lambda: None; "
FIND = BUILD + "print(_build.find_or_build(False))"


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


@pytest.fixture(params=["ninja", "none"])
def with_ninja(request, monkeypatch):
    """With ninja and without."""
    if request.param == "none":
        monkeypatch.setattr(_build, "find_ninja", lambda: None)
    else:
        assert _build.find_ninja() is not None
    return request.param == "ninja"


def run(code, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def compiled(place) -> list[str]:
    """The sources that were compiled since this was asked last, each once for every instruction set."""
    calls = (place / "calls").read_text().splitlines()
    (place / "calls").write_text("")
    return sorted(re.findall(r" -c csrc/(\S+) ", "\n".join(calls)))


def is_whole(library) -> bool:
    return set(library.read_text().split()) == {"built"}


def test_two_processes_build_once_and_say_so_in_one_line(place):
    done = [process.communicate(timeout=60) for process in [run(FIND), run(FIND)]]
    paths, notices = zip(*done, strict=True)
    assert paths[0] == paths[1] and str(place) in paths[0]
    assert sorted(len(n.splitlines()) for n in notices) == [0, 1], notices
    calls = (place / "calls").read_text().splitlines()
    assert sum("-shared" in call for call in calls) == 1
    library = _build.find_or_build(False)
    assert is_whole(library) and sorted(p.name for p in library.parent.iterdir()) == ["_C.so", "lock"]
    assert len((place / "calls").read_text().splitlines()) == len(calls)


def test_the_c_plus_plus_library_is_the_process_s_own(place):
    """A copy of it, as `-static-libstdc++` or a compiler's own habit links it, crashes at the first error message."""
    _build.find_or_build(False)
    link = next(call for call in (place / "calls").read_text().splitlines() if "-shared" in call)
    assert link.endswith(f" {place / 'c++'}")  # what the compiler named


CPU_UNITS = {"x86_64": 3}.get(platform.machine(), 1)


@pytest.mark.parametrize(
    "change,units",
    [
        (lambda csrc: None, []),
        (lambda csrc: os.utime(csrc / "noise.cpp"), []),
        (lambda csrc: append(csrc / "attention.cpp"), ["attention.cpp", "fingerprint.cpp"]),
        (lambda csrc: append(csrc / "attention_cpu.cpp"), ["attention_cpu.cpp"] * CPU_UNITS + ["fingerprint.cpp"]),
        (
            lambda csrc: append(csrc / "attention.h"),
            ["attention.cpp", *["attention_cpu.cpp"] * CPU_UNITS, "fingerprint.cpp"],
        ),
        (lambda csrc: os.utime(append(csrc / "noise.cpp"), (0, 0)), ["fingerprint.cpp", "noise.cpp"]),
    ],
    ids=["nothing", "time-alone", "source", "kernels", "header", "older"],
)
def test_a_change_compiles_what_it_touches(place, monkeypatch, change, units):
    csrc = place / "csrc"
    shutil.copytree(_build.sources(), csrc)
    monkeypatch.setattr(_build, "sources", lambda: csrc)
    first = _build.find_or_build(False)
    assert len(compiled(place)) == 3 + 2 * CPU_UNITS
    change(csrc)
    assert (_build.find_or_build(False) == first) == (not units)
    assert compiled(place) == units
    _build.build(place / "again.so", place / "cache/encdiff" / f"build-{platform.machine()}", False)
    assert compiled(place) == [] and is_whole(place / "again.so")


def append(path):
    path.write_text(path.read_text() + "// changed\n")
    return path


def test_another_version_of_the_compiler_compiles_everything(place):
    units = [_build.build(place / "_C.so", place / "work", False), compiled(place)][1]
    (place / "calls.version").write_text("c++ 99")
    _build.build(place / "_C.so", place / "work", False)
    assert compiled(place) == units and len(units) > 3


def test_a_ninja_that_does_not_start_is_none(tmp_path, monkeypatch):
    broken = tmp_path / "ninja"
    broken.write_text("#!/no/such/python\n")
    broken.chmod(0o755)
    assert not _build.works(str(broken))
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _build.find_ninja() is None


def test_a_failure_is_said_once_and_tried_again_where_asked(place, capsys):
    compiler = place / "c++"
    whole = compiler.read_text()
    compiler.write_text(whole.replace("sleep 0.2\n", "echo no such flag >&2; exit 1\n"))
    for _ in range(2):
        with pytest.raises(_build.BuildError, match="failure.txt"):
            _build.find_or_build(False)
    assert capsys.readouterr().err.count("slower implementations serve in its place") == 1
    with pytest.raises(_build.BuildError, match="no such flag"):
        _build.find_or_build(False, again=True)
    compiler.write_text(whole)
    assert is_whole(_build.find_or_build(False, again=True))
    assert _build.find_or_build(False)


def test_other_flags_compile_everything(place, monkeypatch):
    units = [_build.build(place / "_C.so", place / "work", False), compiled(place)][1]
    monkeypatch.setattr(_build, "CPU", [*_build.CPU, "-g"])
    _build.build(place / "_C.so", place / "work", False)
    assert compiled(place) == units


def test_paths_with_special_characters(place, monkeypatch, with_ninja):
    odd = place / "a b$c:d'e#f"
    odd.mkdir()
    shutil.copy(place / "c++", odd)
    monkeypatch.chdir(odd)
    monkeypatch.setenv("CXX", "./c++")
    _build.build(odd / "_C.so", odd / "work", False)
    assert is_whole(odd / "_C.so") and len(compiled(place)) == 3 + 2 * CPU_UNITS
    _build.build(odd / "_C.so", odd / "work", False)
    assert bool(compiled(place)) != with_ninja


def test_a_failure_says_what_the_compiler_said_and_no_more(place, with_ninja):
    compiler = place / "c++"
    fails = 'case "$*" in *fingerprint.cpp*) sleep 1; echo no such flag >&2; exit 1;; esac\n'
    compiler.write_text(compiler.read_text().replace("sleep 0.2\n", fails))
    with pytest.raises(_build.BuildError) as error:
        _build.build(place / "_C.so", place / "work", False)
    command, output = re.search(r"^(\S+/c\+\+ .* -c .*)\n([^/]*)$", str(error.value), re.M).groups()
    assert shlex.split(command)[-3:] == ["csrc/fingerprint.cpp", "-o", "fingerprint.o"]
    assert output.splitlines()[0] == "no such flag" and "noise.o" not in str(error.value)
    assert not (place / "_C.so").exists()


@pytest.mark.parametrize("compilers_too", [False, True])
def test_a_killed_build_leaves_nothing_half_done(place, compilers_too):
    """Compilers outlive it, in process groups of their own: until they end the next build waits, in the same folder."""
    wait = place / "calls.wait"
    wait.touch()
    process = run(FIND)
    folder = place / "cache/encdiff" / f"build-{platform.machine()}"
    until(lambda: any(path.read_text() == "half\n" for path in folder.glob("*.o")))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert is_locked(folder / "lock")
    if compilers_too:
        killed = set()
        until(lambda: kill_listed(place / "calls.pids", killed) or not is_locked(folder / "lock"))
        assert any(path.read_text() == "half\n" for path in folder.glob("*.o"))
    wait.unlink()
    assert is_whole(_build.find_or_build(False))


def kill_listed(pids, killed: set[str]) -> None:
    """Kill the processes of the list, each once; a compiler that has just been started is not on it yet."""
    for pid in set(pids.read_text().split()) - killed:
        os.kill(int(pid), signal.SIGKILL)
        killed.add(pid)


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_locked(path) -> bool:
    with open(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


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
    command = [sys.executable, "-c", NO_HOME + BUILD + "sys.argv[1:] = []; sys.exit(_build.main())"]
    environment = without("HOME", "XDG_CACHE_HOME", ENCDIFF_CUDA="0")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    said = "encdiff: this user has no home folder for a cache; let XDG_CACHE_HOME name a folder\n"
    assert (done.returncode, done.stderr) == (1, said)


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


def test_the_library_names_no_folder_of_the_machine_that_built_it():
    """Assertions hold the paths of their sources; in a wheel these would be another machine's."""
    library = _build.installed()
    if library is None:
        pytest.skip("no library is installed, or one of other sources: first use builds it elsewhere")
    held = library.read_bytes()
    assert b"csrc/noise.cpp\0" in held
    assert not [place for place in (_build.sources().parent, _build.find_torch().parent) if bytes(place) in held]


def test_ptxas_output_is_read():
    log = """ptxas info    : Compiling entry function '_ZN7encdiff3fooE' for 'sm_90'
ptxas info    : Function properties for _ZN7encdiff3fooE
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 34 registers, used 0 barriers, 420 bytes cmem[0]
"""
    assert list(_build.usages(log)) == [(90, "_ZN7encdiff3fooE", 34, 16, 12)]
