"""Build the native noise engine from csrc/: at install, or once at first use into the user's cache.

    python -P encdiff/ops/_build.py          # build it now, where first use would look for it, and print the path
    python -P encdiff/ops/_build.py --check  # compile the CUDA half for every target: what each kernel needs

It is compiled against PyTorch's stable ABI and uses no Python API at all, so one build serves every torch >= 2.11 and
every Python. ENCDIFF_CUDA: `auto` compiles the CUDA half where nvcc is found, `1` insists on it, `0` leaves it out; a
GPU is not looked for. CXX and CUDA_HOME name the compilers, else PATH does. ENCDIFF_SANITIZE=1 builds for the address
and undefined-behaviour sanitizers. Ninja runs the compilers, at once and only for what has changed; without ninja they
all run. setup.py runs this file by its path: nothing of the package is imported, nor torch.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import TextIOWrapper
from pathlib import Path
from typing import NamedTuple, cast

ARCHITECTURES = (80, 90, 100)  # and PTX of the last for what comes after
CPU_SOURCES = ("noise", "attention")  # X.cpp: checks and registration; X_cpu.cpp: once for each instruction set
ISAS = {"baseline": [], "avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]}
COMMON = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # the ABI of torch 2.11
CPU = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
CUDA = ["--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden"]  # no contraction: CPU and GPU round alike

# Headers of torch and of the system are not followed (-MMD): the ABI is stable, and one library serves every torch.
RULES = """\
rule compile
  command = $command_line
  description = $out
  depfile = $out.d
  deps = gcc
rule link
  command = $command_line
  description = $out
"""


class BuildError(Exception):
    """The native engine cannot be built; the message says why."""


class Edge(NamedTuple):
    """A file and the command that makes it, an edge of ninja's graph; paths are relative to the build's folder."""

    rule: str
    output: str
    inputs: list[str]
    command: list[str]


def sources() -> Path:
    """The folder of the sources: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "csrc" if (package / "csrc").is_dir() else package.parent / "csrc"


def source_files() -> list[Path]:
    return sorted(sources().glob("*.[hc]*"))


def fingerprint() -> str:
    """What the build depends on of ours, so that a library from older sources is recognised."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + b"sanitize" * sanitized())
    for path in source_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def sanitized() -> bool:
    return os.environ.get("ENCDIFF_SANITIZE") == "1"


def find_compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return os.path.abspath(found)
    raise BuildError("no C++ compiler on PATH, and CXX names none")


def wanted_cuda() -> str:
    return os.environ.get("ENCDIFF_CUDA", "auto")


def find_nvcc() -> str | None:
    """nvcc, or None where ENCDIFF_CUDA does not want it or `auto` does not find it."""
    wanted = wanted_cuda()
    if wanted not in ("auto", "0", "1"):
        raise BuildError(f"ENCDIFF_CUDA is {wanted!r}, must be auto, 0 or 1")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    if found is None and wanted == "1":
        raise BuildError("ENCDIFF_CUDA=1 asks for the CUDA half, but no nvcc is in CUDA_HOME or on PATH")
    return found and os.path.abspath(found)


def find_torch() -> Path:
    spec = importlib.util.find_spec("torch")  # finds, does not import
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed")
    folder = Path(spec.origin).absolute().parent
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        raise BuildError(f"the torch in {folder} has no stable ABI headers")
    return folder


def find_ninja() -> str | None:
    """The ninja of the package of that name, else the one on PATH, else None."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    for path in (BIN_DIR, None):
        if (found := shutil.which("ninja", path=path)) and works(found):
            return os.path.abspath(found)
    return None


def works(program: str) -> bool:
    """Whether it starts: a script's own interpreter may be gone."""
    try:
        return subprocess.run([program, "--version"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def build(target: Path, folder: Path, cuda: bool = True) -> None:
    """Compile and link in `folder`, which is kept for the next build, then place the library, whole or not at all.

    `cuda=False` leaves the CUDA half out in any case. Processes with the same folder wait for each other.
    """
    compiler, torch = find_compiler(), find_torch()
    nvcc = find_nvcc() if cuda else None
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        copy_sources(folder)
        execute(graph(compiler, nvcc, torch), folder, lock.fileno())
        part = target.with_name(f".part-{target.name}")
        shutil.copy(folder / "library.so", part)
        os.replace(part, target)


def copy_sources(folder: Path) -> None:
    """Bring `folder/csrc` up to date. Only what differs is written, since ninja goes by times of change.

    Those of the sources themselves may mislead it: another version's files may be older than the objects of this one's.
    """
    copies = folder / "csrc"
    copies.mkdir(exist_ok=True)
    wanted = {path.name: path.read_bytes() for path in source_files()}
    for copy in copies.iterdir():
        if copy.is_dir():
            shutil.rmtree(copy)
        elif wanted.get(copy.name) == copy.read_bytes():
            del wanted[copy.name]
        else:
            copy.unlink()
    for name, content in wanted.items():
        copy = copies / name
        copy.write_bytes(content)


def graph(compiler: str, nvcc: str | None, torch: Path) -> list[Edge]:
    """The edges of the objects, the slowest first, and of the library."""
    objects = list(compilations(compiler, nvcc, torch))
    names = sorted(edge.output for edge in objects)
    runtime = [str(cuda_library(nvcc)), "-ldl", "-lrt", "-lpthread"] if nvcc else []
    needed = [f"-L{torch / 'lib'}", "-ltorch_cpu", *runtime, *standard_library(compiler)]
    link = [compiler, "-shared", "-o", "library.so", *names, *needed]
    return [*objects, Edge("link", "library.so", names, link)]


def compilations(compiler: str, nvcc: str | None, torch: Path) -> Iterator[Edge]:
    made_by = f"-DENCDIFF_TOOLS={versions(compiler, *([nvcc] if nvcc else []))}"  # another version compiles anew
    if nvcc:
        yield compilation("cuda", "noise.cu", [nvcc, "-ccbin", compiler, made_by, *COMMON, *CUDA, *targets(nvcc)])
    common = [compiler, *COMMON, *CPU, made_by, *(SANITIZE if sanitized() else [])]
    place = f"-fmacro-prefix-map={torch.parent}/="  # so that no error message names the machine that built a wheel
    include = ["-isystem", str(torch / "include"), place, *(["-DENCDIFF_WITH_CUDA"] if nvcc else [])]
    for name in CPU_SOURCES:
        yield compilation(name, f"{name}.cpp", [*common, *include])
        for isa in ISAS if platform.machine() in ("x86_64", "AMD64") else ["baseline"]:
            yield compilation(f"{name}_{isa}", f"{name}_cpu.cpp", [*common, *ISAS[isa], f"-DENCDIFF_ISA={isa}"])
    yield compilation("fingerprint", "fingerprint.cpp", [*common, f'-DENCDIFF_SOURCES="{fingerprint()}"'])


def versions(*tools: str) -> str:
    """What the compilers say of themselves, in a few letters."""
    said = [subprocess.run([tool, "--version"], capture_output=True, check=False).stdout for tool in tools]
    return hashlib.sha256(b"".join(said)).hexdigest()[:8]


def compilation(name: str, source: str, command: list[str]) -> Edge:
    output, source = f"{name}.o", f"csrc/{source}"
    return Edge("compile", output, [source], [*command, "-MMD", "-MF", f"{output}.d", "-c", source, "-o", output])


def execute(edges: list[Edge], folder: Path, *keep_open: int) -> str:
    """Bring the files of the edges up to date; what the commands said. Without ninja every one runs.

    `keep_open` are descriptors of locks: what a killed process leaves running holds them until it ends.
    """
    manifest = folder / "build.ninja"
    manifest.write_bytes(os.fsencode(RULES + "".join(map(statement, edges))))
    ninja = find_ninja()
    if ninja:
        return run([ninja], folder, *keep_open)
    first, last = ([e.command for e in edges if (e.rule == "link") == link] for link in (False, True))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = [*pool.map(lambda command: run(command, folder, *keep_open), first)]
    return "".join(said + [run(command, folder, *keep_open) for command in last])


def statement(edge: Edge) -> str:
    """An edge in the language of build.ninja."""
    command = shlex.join(edge.command).replace("$", "$$")
    return f"build {edge.output}: {edge.rule} {' '.join(edge.inputs)}\n  command_line = {command}\n"


def targets(nvcc: str) -> list[str]:
    """-gencode for each architecture this nvcc knows, and PTX of the last."""
    known = run([nvcc, "--list-gpu-arch"])
    names = [str(a) for a in ARCHITECTURES if f"compute_{a}\n" in known]
    pairs = [f"arch=compute_{a},code=sm_{a}" for a in names] + [f"arch=compute_{names[-1]},code=compute_{names[-1]}"]
    return [word for pair in pairs for word in ("-gencode", pair)]


def cuda_home(nvcc: str) -> Path:
    top = re.search(r"^#\$ TOP=(.*)$", run([nvcc, "-dryrun", "-c", "x.cu"]), re.M)  # nvcc itself may be a script
    return Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent


def cuda_library(nvcc: str) -> Path:
    home = cuda_home(nvcc)
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (home / folder / "libcudart_static.a").exists():
            return home / folder / "libcudart_static.a"
    raise BuildError(f"no libcudart_static.a in {home}")


def standard_library(compiler: str) -> list[str]:
    """The C++ library that PyTorch has loaded, by name: some compilers would link a copy of their own into ours.

    Two in one process crash where a message is formatted: in a segmentation fault in place of an exception.
    """
    asked = [compiler, "-print-file-name=libstdc++.so.6"]
    found = Path(subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip())
    return [str(found)] if found.is_absolute() and found.is_file() else []


def run(command: list[str], folder: Path | None = None, *keep_open: int) -> str:
    environment = os.environ | {"NINJA_STATUS": "[%f/%t] "}  # marks ninja's lines of progress, which are left out
    done = subprocess.run(
        command, cwd=folder, env=environment, pass_fds=keep_open, capture_output=True, text=True, check=False
    )
    output = re.sub(r"^\[\d+/\d+\] .*\n", "", done.stdout + done.stderr, flags=re.M)
    if done.returncode:
        where = f"in {folder}\n" if folder else ""
        raise BuildError(f"{where}{shlex.join(command)}\n{output[-4000:]}")
    return output


def installed() -> Path | None:
    """The library that an install left in the package, unless it was built from other sources."""
    path = Path(__file__).resolve().parents[1] / "_C.abi3.so"
    return path if path.exists() and f"encdiff-sources:{fingerprint()}".encode() in path.read_bytes() else None


def user_cache() -> Path:
    """Where this user's builds and verdicts are kept; OSError where the environment names no place for them."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # in a container, a user without a name
        raise OSError("this user has no home folder for a cache; let XDG_CACHE_HOME name a folder") from None


def find_or_build(torch_has_cuda: bool, again: bool = False) -> Path:
    """The installed library, or one in the user's cache, built there by the first process that needs it.

    A failure is kept beside it, so that it costs the compiler's time once, and said; `again` tries anew, and its error
    is the compiler's own.
    """
    if (path := installed()) is not None:
        return path
    cache = user_cache()
    cuda = wanted_cuda() == "1" or (wanted_cuda() == "auto" and torch_has_cuda)
    folder = cache / "encdiff" / f"{fingerprint()}-{platform.machine()}-{'cuda' if cuda else 'cpu'}"
    library, failure = folder / "_C.so", folder / "failure.txt"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if failure.exists() and not again:
            raise BuildError(f"the build failed before, {failure} says why; delete it to try again")
        if not library.exists():
            failure.unlink(missing_ok=True)
            find_compiler()  # quietly: without a compiler the reference serves, as the install said
            print(f"encdiff: building the native noise engine once, into {folder}", file=sys.stderr, flush=True)
            try:
                build(library, cache / "encdiff" / f"build-{platform.machine()}", cuda)
            except BuildError as error:
                failure.write_text(f"{error}\n")
                if again:
                    raise
                said = f"the build failed, {failure} says why"
                print(f"encdiff: {said}; slower implementations serve in its place", file=sys.stderr, flush=True)
                raise BuildError(said) from error
    return library


class Usage(NamedTuple):
    architecture: int
    kernel: str
    registers: int
    stack: int
    spills: int


def usages(log: str) -> Iterator[Usage]:
    """What `ptxas -v` says of each kernel."""
    pattern = (
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for name, architecture, stack, stores, loads, registers in re.findall(pattern, log, re.S):
        yield Usage(int(architecture), name, int(registers), int(stack), int(stores) + int(loads))


def check() -> bool:
    """Print one line per target and kernel; False where a kernel uses the stack or spills."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("the check needs nvcc")
    flags = [nvcc, *COMMON, *CUDA, "-Xptxas", "-v"]
    codes = {a: ["-gencode", f"arch=compute_{a},code=sm_{a}"] for a in ARCHITECTURES}
    with tempfile.TemporaryDirectory() as folder:
        copy_sources(Path(folder))
        log = execute([compilation(f"sm_{a}", "noise.cu", [*flags, *code]) for a, code in codes.items()], Path(folder))
    rows = sorted(usages(log))
    good = {row.architecture for row in rows} == set(ARCHITECTURES)
    for architecture, kernel, registers, stack, spills in rows:
        pattern = r".*\d(q_sample|step|threshold|draw)_kernelINS_\d+(\w+?)E(?:Lb([01])|).*"
        name = re.sub(pattern, r"\1 \2 \3", kernel)
        clean = stack == spills == 0
        good = good and clean
        verdict = "ok" if clean else "FAIL"
        print(f"sm_{architecture} {name:28} registers {registers:3} stack {stack} spills {spills} {verdict}")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(prog="_build.py", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compile the CUDA half and report each kernel's resources")
    try:
        if parser.parse_args().check:
            return 0 if check() else 1
        # a path may hold what the terminal cannot show
        cast(TextIOWrapper, sys.stdout).reconfigure(errors="backslashreplace")
        print(installed() or find_or_build(find_nvcc() is not None, again=True))
    except (BuildError, OSError) as error:
        print(f"encdiff: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
