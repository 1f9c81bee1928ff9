"""Every variant of every kernel, checked in processes of their own.

    python -m encdiff.health.kernels DEVICE FAMILY,... FIRST STEP

takes each STEP-th check from the FIRST on, and writes one line of JSON for each. Where it dies, since a kernel can take
the whole process with it, the check that it was at is the finding, and another process goes on behind it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryFile
from threading import Event, Lock, Timer

import torch

from encdiff.ops import _families, _families_native, _native
from encdiff.ops._check import Family, Finding, Variant, check, is_lost
from encdiff.ops._triton import not_for

SILENCE = 300  # seconds of one check, compilation included
PROCESSES = 8  # on a GPU at most: each holds some hundred megabytes there
LOST = 3  # the exit code where the device serves no one any more: what was found before it stands


def families(device: torch.device) -> dict[str, Family]:
    """Those that can be checked on a device; of the native engine what is built of it."""
    triton = {} if not_for(device) else _families.FAMILIES
    problem, has_cuda = _native.load()
    served = _families_native.FAMILIES if device.type == "cpu" else _families_native.ON_GPU if has_cuda else ()
    native = {name: _families_native.FAMILIES[name] for name in served if not problem}
    return triton | native


def every(device: torch.device, names: Iterable[str]) -> list[tuple[Family, Variant, bool]]:
    """Each check of these families, and whether with gradients."""
    found, known = [], families(device)
    for family in (known[name] for name in names):
        for variant in family.variants():
            mapped = variant[-1] in ("head", "mean")  # attention maps have no gradient
            found.append((family, variant, family.differentiable and not mapped))
    return found


def check_all(device: torch.device, names: list[str], report: Callable[[Finding, int, int], None]) -> list[Finding]:
    """All findings, in the order of `every`; `report(finding, done, all)` is called as they come."""
    checks, found, lock = every(device, names), {}, Lock()
    running: set[subprocess.Popen] = set()
    stopped = Event()
    step = min(os.cpu_count() or 1, PROCESSES if device.type == "cuda" else len(checks))

    def take(n: int, errors: dict[str, float], wrong: list[str], lasting: bool) -> int:
        family, variant, gradients = checks[n]
        with lock:
            found[n] = Finding(family.name, variant, gradients, errors, wrong, lasting)
            report(found[n], len(found), len(checks))
        return n + step

    def watch(at: int) -> None:
        while at < len(checks) and not stopped.is_set():
            begun = at
            with TemporaryFile("w+") as complaint:
                process = _start(device, names, at, step, complaint)
                running.add(process)
                for line in _lines(process):
                    at = take(*json.loads(line))
                code = process.wait()
                running.discard(process)
                if at < len(checks) and code != LOST and not stopped.is_set():
                    complaint.seek(0)
                    said = " ".join(complaint.read().split())[-300:]
                    if at == begun == at % step:  # not even the first one
                        raise RuntimeError(f"kernels cannot be checked, the process ended with {code}: {said}")
                    at = take(at, {}, [f"the process died, {code}: {said}"], False)

    with ThreadPoolExecutor(step) as pool:
        try:
            list(pool.map(watch, range(step)))
        except BaseException:  # the user's Ctrl-C, a time limit: no process is left behind
            stopped.set()
            for process in list(running):
                process.kill()
            raise
    return [found[n] for n in sorted(found)]


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """What it prints; it is killed once it is silent for too long, as a kernel that never ends makes it."""
    assert process.stdout is not None, "begun with a pipe"
    while True:
        watchdog = Timer(SILENCE, process.kill)
        watchdog.start()
        line = process.stdout.readline()
        watchdog.cancel()
        if not line:
            return
        yield line


def _start(device: torch.device, names: list[str], first: int, step: int, complaint) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if device.type == "cpu":
        environment |= {"TRITON_INTERPRET": "1"}
    else:
        environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-m", "encdiff.health.kernels", str(device), ",".join(names)]
    command += [str(first), str(step)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaint, text=True, env=environment)


def main(device: str, names: str, first: str, step: str) -> int:
    on = torch.device(device)
    checks = every(on, names.split(","))
    for n in range(int(first), len(checks), int(step)):
        family, variant, gradients = checks[n]
        try:
            finding = check(family, variant, gradients, on)
        except torch.cuda.OutOfMemoryError:
            finding = Finding(family.name, variant, gradients, {}, ["the device is out of memory"], lasting=False)
        print(json.dumps((n, finding.errors, finding.wrong, finding.lasting)), flush=True)
        if finding.wrong and is_lost(on):
            return LOST
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
