"""What runs beside: processes that build, compile and check while nothing is timed, and compiled peers that wait."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from bench.gpu.lab import Lab

ROOT = Path(__file__).parents[2]


class Worker(NamedTuple):
    """`python -m bench.gpu OUT --worker NAME`: it leaves NAME.json in the folder of parts."""

    name: str
    process: subprocess.Popen
    result: Path

    def wait(self, end: float) -> dict | list:
        """Its result, or {"error": ...} if it failed or is not done by `end` (then it is stopped)."""
        try:
            self.process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.stop()
            return {"error": f"{self.name}: out of time"}
        if not self.result.exists():
            return {"error": f"{self.name}: exit status {self.process.returncode}, see its log"}
        return json.loads(self.result.read_text())

    def ready(self) -> bool:
        """Whether it waits to be let go, or is over."""
        return self.result.with_suffix(".ready").exists() or self.process.poll() is not None

    def go(self) -> None:
        self.result.with_suffix(".go").touch()

    def pause(self, paused: bool = True) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGSTOP if paused else signal.SIGCONT)

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def slug_of(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def start(lab: Lab, name: str, *arguments: str) -> Worker:
    """Begin one; what it prints goes to parts/NAME.log."""
    parts = lab.out / "parts"
    parts.mkdir(exist_ok=True)
    slug = slug_of(name)
    for kind in ("json", "ready", "go"):  # of an earlier run into the same folder
        (parts / f"{slug}.{kind}").unlink(missing_ok=True)
    command = [sys.executable, "-u", "-m", "bench.gpu", str(lab.out), "--caches", str(lab.caches), "--worker", name]
    command += [*arguments, *(["--cpu"] if lab.cpu else [])]
    with (parts / f"{slug}.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    return Worker(name, process, parts / f"{slug}.json")


def work(lab: Lab, name: str, seconds: float) -> None:
    """In the worker: do what its name says, write its result."""
    slug = slug_of(name)
    began = time.monotonic()

    def ready() -> None:
        waiting = time.monotonic()
        (lab.out / "parts" / f"{slug}.ready").write_text(str(waiting - began))
        while not (lab.out / "parts" / f"{slug}.go").exists():
            time.sleep(0.05)

    try:
        result = _work(lab, name, seconds, ready)
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {str(error).strip()[:600]}"}
    if isinstance(result, dict) and (marker := lab.out / "parts" / f"{slug}.ready").exists():
        result["compile_s"] = float(marker.read_text())
    path = lab.out / "parts" / f"{slug}.json"
    path.with_suffix(".part").write_text(json.dumps(result))
    path.with_suffix(".part").replace(path)


def _work(lab: Lab, name: str, seconds: float, ready) -> dict | list:
    kind, _, rest = name.partition(" ")
    if kind == "build":
        from encdiff.ops import _native

        problem, has_cuda = _native.load()
        return {"problem": problem, "cuda": has_cuda}
    if kind == "warm":
        from bench.gpu import steps

        step = steps.advance(steps.ours(lab, masters=True, precision="bf16", engine="eager"), lab)
        return {"loss": float(step()["loss"])}
    if kind == "aside":  # a block's own work; of those to be timed later what compiles their kernels
        from bench.gpu.measures import MEASURES, named

        name, _, ours = rest.partition(" ")
        os.nice(5)
        aside = replace(lab, out=lab.out / "parts" / slug_of(rest))
        aside.out.mkdir(exist_ok=True)
        if not ours:
            return named(MEASURES[name])(aside)
        named(MEASURES[name])(aside, ours_alone=True)
        return {}
    if kind == "shipped":
        from bench.gpu import shipped

        return shipped.measure(lab, ready, seconds)
    if kind == "right":
        from bench.gpu import checks

        share, shares = map(int, rest.split("/"))
        return checks.measure(lab, share, shares, lab.batch)
    if kind == "tiles":
        from bench.gpu import tiles

        os.nice(10)  # it goes on while others are timed
        share, shares = map(int, rest.split("/"))
        return tiles.compile_share(lab, share, shares)
    if kind == "tests":
        os.nice(15)
        return run_tests(lab, seconds)
    if kind == "first":
        from bench.gpu import first_stage

        return first_stage.train(lab, seconds)
    from bench.gpu import compiled

    with nullcontext() if lab.cpu else torch.cuda.stream(torch.cuda.Stream()):  # see bench.clock.captured
        return compiled.PEERS[rest](lab, ready)


def run_tests(lab: Lab, seconds: float) -> dict:
    """The tests of kernels on the device, as far as they come in so many seconds: counts, and what failed."""
    processes = [] if lab.cpu else ["-n", "3"]
    chosen = ["tests/test_geglu.py"] if lab.cpu else tests_for_a_gpu()
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *processes, *chosen]
    log = lab.out / "parts" / "pytest.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True, env=test_env())
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then prints the failures so far
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
    text = log.read_text(errors="replace").splitlines()
    counts = {word: sum(f" {word} " in f" {line} " for line in text) for word in ("PASSED", "FAILED", "SKIPPED")}
    failed = sorted({line.strip() for line in text if line.startswith(("FAILED", "ERROR"))} or
                    {line.strip() for line in text if " FAILED " in line})  # fmt: skip
    return {"ended": process.returncode is not None and process.returncode >= 0, **counts, "failed": failed[:60]}


def tests_for_a_gpu() -> list[str]:
    """The files of tests that run on a GPU or ask for one; those of whole steps first."""
    marks = "on_gpu", "needs_gpu"
    files = sorted(p for p in (ROOT / "tests").glob("test_*.py") if any(mark in p.read_text() for mark in marks))
    first = "test_beside", "test_masters", "test_engine", "test_native"
    return [str(p) for p in sorted(files, key=lambda p: p.stem not in first)]


def test_env() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_lines(found: dict) -> list[str]:
    return [", ".join(f"{k} {v}" for k, v in found.items() if k != "failed"), *found.get("failed", [])[:15]]
