"""Compile the configurations that dispatch can choose, for three generations of GPU, without one.

    python -m encdiff.kernels._gate [--brief | --hopper] [module ...]

A kernel module, `kernels/X.py` or a folder, lists its configurations in `gate_cases()`: every tile that a preset's
layers take, and of tiles that differ from their neighbours by a width alone the narrowest and the widest. Each is
compiled ahead of time for each of `TARGETS`; the machine code must use no local memory and no stack (that is, spill no
register, unless a tile that spills some was measured to be faster: `GateCase.spills`) and stay within the shared memory
of one block; a kernel of matrix products must contain tensor-core instructions. Exits 1 on a failure. `--brief`: the
first case of each kernel, for sm_90 alone. `--hopper`: every case for sm_90, of the others the first of each kernel.
"""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

# compute capability -> shared memory of one block in bytes (CUDA C++ Programming Guide, table of technical
# specifications) and what its tensor cores are called in PTX
TARGETS = {
    80: (163 * 1024, r"\bmma\.sync"),
    90: (227 * 1024, r"\bwgmma\.mma_async|\bmma\.sync"),
    100: (227 * 1024, r"\btcgen05\.mma|\bmma\.sync"),
}
REGISTERS = 255  # of one thread, on all of them


class GateCase(NamedTuple):
    """One configuration of a kernel.

    signature: every argument -> its Triton type in the order of the kernel's, "constexpr" for those in `constexprs`.
        A pointer is aligned to 16 bytes, as PyTorch allocates; ":1" after its type says that it is not. An integer is
        any; ":16" after its type says that it is a multiple of 16.
    """

    name: str
    kernel: Any  # triton.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    tensor_cores: bool = True
    spills: int = 0  # bytes of a thread's stack at most


def gate_signature(kernel: Any, types: dict[str, str], constexprs: dict[str, Any]) -> dict[str, str]:
    """The signature of a kernel whose other arguments are integers that may be anything."""
    return {n: "constexpr" if n in constexprs else types.get(n, "i32") for n in kernel.arg_names}


class Row(NamedTuple):
    """What one case became on one target; `failure` is empty where it passes."""

    name: str
    target: int
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    tensor_cores: str = ""
    failure: str = ""

    def __str__(self) -> str:
        figures = f"{self.registers:>4} {self.stack:>5} {self.local:>5} {self.shared:>7}  {self.tensor_cores:<16}"
        return f"{self.name:<60} sm_{self.target:<4} {figures} {self.failure or 'ok'}"


HEADER = f"{'kernel and configuration':<60} {'target':<7} {'regs':>4} {'stack':>5} {'local':>5} {'shared':>7}  product"


def examine(case: GateCase, target: int) -> Row:
    """Compile one case for one target and read its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: kind.partition(":")[0] for name, kind in case.signature.items()}
    source = ASTSource(case.kernel, types, case.constexprs, _attributes(case.signature))
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:  # whatever the compiler says is the finding; the other cases still want to be read
        return Row(case.name, target, failure=f"{type(error).__name__}: {str(error).strip()[:300]}")
    usage = resource_usage(compiled.asm["cubin"])
    found = sorted(set(re.findall(TARGETS[target][1], compiled.asm["ptx"])))
    figures = usage["REG"], usage["STACK"], usage["LOCAL"], compiled.metadata.shared
    row = Row(case.name, target, *figures, " ".join(found))
    return row._replace(failure="; ".join(failures(row, case)))


def failures(row: Row, case: GateCase) -> list[str]:
    found = []
    if row.stack > case.spills or row.local:
        found.append(f"spills: stack {row.stack}, local {row.local} bytes")
    if row.registers > REGISTERS:
        found.append(f"{row.registers} registers of {REGISTERS}")
    if row.shared > TARGETS[row.target][0]:
        found.append(f"{row.shared} bytes of shared memory of {TARGETS[row.target][0]}")
    if case.tensor_cores and not row.tensor_cores:
        found.append("no tensor-core instruction")
    return found


def resource_usage(cubin: bytes) -> dict[str, int]:
    """{"REG": .., "STACK": .., "SHARED": .., "LOCAL": ..} of the one kernel in a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if "REG:" in line]
    if len(lines) != 1:
        raise RuntimeError(f"{tool} must describe one kernel, says: {done.stdout}")
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", lines[0])}


def _attributes(signature: dict[str, str]) -> dict[tuple[int], list]:
    """What a launch finds out about its arguments: which of them are multiples of 16."""
    attributes = {}
    for i, kind in enumerate(signature.values()):
        kind, _, multiple = kind.partition(":")
        if multiple == "16" or (kind.startswith("*") and not multiple):
            attributes[i,] = [["tt.divisibility", 16]]
    return attributes


def modules() -> list[str]:
    """Every public module and package of this one."""
    folder = Path(__file__).parent
    return sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_"))


def cases(module: str) -> Iterator[GateCase]:
    yield from getattr(importlib.import_module(f"encdiff.kernels.{module}"), "gate_cases", tuple)()


def _examine_nth(module: str, n: int, targets: tuple[int, ...]) -> list[Row]:
    case = list(cases(module))[n]
    return [examine(case, target) for target in targets]


def rows(names: Iterable[str], brief: bool = False, hopper: bool = False) -> Iterator[Row]:
    """Every case of these modules on every target, one process per core; Triton's own cache keeps what is unchanged."""
    targets, work, met = (90,) if brief else tuple(TARGETS), [], set()
    for name in names:
        for n, case in enumerate(cases(name)):
            known = case.kernel.__name__ in met
            if not brief or not known:
                work.append((name, n, (90,) if hopper and known else targets))
            met.add(case.kernel.__name__)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for found in pool.map(_examine_nth, *zip(*work, strict=True)) if work else ():
            yield from found


def main(names: list[str]) -> int:
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
    start, failed, count = time.monotonic(), 0, 0
    flags = {flag: f"--{flag}" in names for flag in ("brief", "hopper")}
    names = [name for name in names if name.removeprefix("--") not in flags]
    if unknown := sorted(set(names) - set(modules())):
        print(f"gate: no module {unknown[0]!r}, must be among {', '.join(modules())}", file=sys.stderr)
        return 2
    print(HEADER)
    for row in rows(names or modules(), **flags):
        print(row, flush=True)
        count += 1
        failed += bool(row.failure)
    print(f"{count} compilations, {failed} failed, {time.monotonic() - start:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
