"""All that needs a GPU in one run of ten minutes: `make gpu OUT=folder`, or

    python3 -m bench.gpu OUT [--minutes 9.5] [--only NAME,NAME] [--cpu]

Builds the native engine, then checks, times and trains, without network, with the Python that runs it. A phase has a
time limit of its own; one that fails or runs out of time is recorded and the next begins. OUT then holds summary.md,
log.txt, benchmarks.json, report.md, training.csv, profile.txt and trace.json.gz. `--cpu` goes through the same phases
without a GPU, where each can say no more than that the script works. Exit status 1 where a phase failed.
"""

import argparse
import gzip
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from bench import report

ROOT = Path(__file__).parent.parent
LOG_BYTES = 8 * 2**20
GRACE = 15  # seconds between asking a phase to stop and ending it
DATA = "procedural:4,4,4,4,4,4"


class Phase(NamedTuple):
    """One command and the seconds it may take; what ends well when interrupted, as a training does, may take them."""

    name: str
    seconds: int
    command: list[str]
    env: dict[str, str] = {}  # noqa: RUF012


class Outcome(NamedTuple):
    name: str
    result: str  # "ok" or what went wrong
    seconds: float
    last: str  # line of its output

    @property
    def failed(self) -> bool:
        return self.result != "ok"


def plan(work: Path, cpu: bool) -> list[Phase]:
    """The phases, what is wanted most first; they leave what they make in `work`."""
    python = [sys.executable, "-u"]
    encdiff, pytest = [*python, "-m", "encdiff"], [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    quick = ["--benchmark-max-time=0.1", "--benchmark-min-rounds=3", "--benchmark-columns=median"]
    workers = ["-n", "12"] if importlib.util.find_spec("xdist") and not cpu else []
    slow = "compiled or diffusers or compile"
    train = ["--data", DATA, "--overwrite", "--checkpoint-every", "100000", "--picture-every", "100000"]
    stage = ["--first-stage", str(work / "vq")]
    paper = ["--preset", "shapes3d", *stage] + (["--batch-size", "4"] if cpu else ["--precision", "bf16"])
    sanitizer = [] if cpu else ["compute-sanitizer", "--error-exitcode", "9", "--tool"]

    def bench(name: str, seconds: int, files: Iterable[str], chosen: str) -> Phase:
        paths = [f"bench/bench_{file}.py" for file in files]
        json_file = f"--benchmark-json={work / name}.json"
        return Phase(name, seconds, [*pytest, *quick, json_file, *paths, "-k", chosen])

    whole = ("unet", "train_step", "sampling")
    ops = sorted(p.stem.removeprefix("bench_") for p in (ROOT / "bench").glob("bench_*.py"))
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that a read past a tensor's end leaves its allocation
    return [
        Phase("machine", 20, ["bash", "-c", "nvidia-smi; nvcc --version; df -h ."] if not cpu else ["uname", "-a"]),
        Phase("build", 120, [*python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation",
                             "-e", "."], {"ENCDIFF_CUDA": "0" if cpu else "1", "PIP_BREAK_SYSTEM_PACKAGES": "1"}),
        Phase("checks", 60, [*pytest, "bench", "--benchmark-disable", "-k", f"not ({slow})"]),
        bench("ops", 75, [op for op in ops if op not in whole], f"not ({slow})"),
        bench("whole", 75, whole, f"not ({slow})"),
        Phase("quickstart", 20, [*encdiff, "train", "--run", str(work / "quickstart"), *train]),
        Phase("first stage", 15, [*encdiff, "train-autoencoder", "--run", str(work / "vq"), *train]),
        Phase("paper", 25, [*encdiff, "train", "--run", str(work / "paper"), *train, *paper]),
        Phase("profile", 30, [*encdiff, "profile", "--out", str(work / "profile")] + ([] if cpu else [
            "--preset", "shapes3d", "--precision", "bf16"])),
        Phase("tests", 90, [*pytest, *workers, "tests", "-m", "not on_gpu"]),
        Phase("kernels", 60, [*pytest, *workers, "tests", "-m", "on_gpu"]),
        Phase("memcheck", 45, [*sanitizer, *([] if cpu else ["memcheck"]), *python, "-m", "bench.small"], uncached),
        Phase("racecheck", 45, [*sanitizer, *([] if cpu else ["racecheck"]), *python, "-m", "bench.small"]),
        bench("compiled", 180, [*whole, *(op for op in ops if op not in whole)], slow),
    ]  # fmt: skip


def run(phase: Phase, seconds: float, log: Path) -> Outcome:
    """One phase, its output appended to `log`; interrupted when its time is up, ended a little later."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                phase.command, cwd=ROOT, env=os.environ | phase.env, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=heed_interrupts,
            )  # fmt: skip
        except OSError as error:
            return Outcome(phase.name, f"cannot start: {error}", 0.0, "")
        late = not ended(process, seconds)
        code = process.returncode
        output.seek(0)
        text = output.read().decode(errors="replace")
    with log.open("a") as file:
        file.write(f"\n===== {phase.name}: {' '.join(phase.command)}\n{text}\n")
    result = "ok" if code == 0 else f"out of time after {seconds:.0f} s" if late else f"exit status {code}"
    lines = [line for line in text.splitlines() if line.strip()]
    return Outcome(phase.name, result, time.monotonic() - began, lines[-1].strip()[:200] if lines else "")


def heed_interrupts() -> None:
    """In the child: a shell that runs this script in the background has it ignore SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ended(process: subprocess.Popen, seconds: float) -> bool:
    """Wait for a process; when its time is up, stop it and all that it started, and return False."""
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest then writes what it has, a training saves
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return False


def run_all(phases: list[Phase], out: Path, seconds: float) -> list[Outcome]:
    """Every phase in turn, each within its own limit and what is left of `seconds`."""
    end, outcomes, log = time.monotonic() + seconds, [], out / "log.txt"
    for phase in phases:
        left = end - time.monotonic()
        if left < 1:
            outcomes.append(Outcome(phase.name, "not begun: no time left", 0.0, ""))
        else:
            outcomes.append(run(phase, min(phase.seconds, left), log))
        print(f"{phase.name:12} {outcomes[-1].seconds:6.1f} s  {outcomes[-1].result}  {outcomes[-1].last}", flush=True)
        (out / "summary.md").write_text(summary(outcomes))  # also there when this script is ended
    return outcomes


def summary(outcomes: list[Outcome]) -> str:
    rows = [f"| {o.name} | {o.result} | {o.seconds:.1f} | {o.last.replace('|', '/')} |" for o in outcomes]
    failed = sum(o.failed for o in outcomes)
    head = f"{len(outcomes)} phases, {failed} failed; commit {os.environ.get('ENCDIFF_COMMIT', 'unknown')}"
    return "\n".join([head, "", "| phase | result | seconds | last line |", "|---|---|---|---|", *rows, ""])


def collect(work: Path, out: Path) -> None:
    """Gather what the phases left into a few files; what a phase did not leave is left out."""
    runs = []
    for path in sorted(work.glob("*.json")):
        try:
            runs.append(report.read(path))
        except report.BadFile as error:  # of a phase that was ended before it wrote
            print(error)
    if runs:
        merged = report.merge(runs)
        (out / "benchmarks.json").write_text(json.dumps(merged))
        (out / "report.md").write_text(report.markdown(merged))
    with (out / "training.csv").open("w") as file:
        for path in sorted(work.glob("*/log.csv")):
            file.writelines(f"{path.parent.name},{line}" for line in path.read_text().splitlines(keepends=True))
    if (work / "profile" / "table.txt").exists():
        shutil.copy(work / "profile" / "table.txt", out / "profile.txt")
        with (work / "profile" / "trace.json").open("rb") as trace, gzip.open(out / "trace.json.gz", "wb") as packed:
            shutil.copyfileobj(trace, packed)
    log = out / "log.txt"
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.write_bytes(log.read_bytes()[-LOG_BYTES:])


def commit() -> str:
    """Of the checkout, or what ENCDIFF_COMMIT says of a copy without history."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found = "unknown"
    return os.environ.get("ENCDIFF_COMMIT") or found


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all phases together")
    parser.add_argument("--only", help="these phases, such as build,ops")
    parser.add_argument("--cpu", action="store_true", help="go through the phases without a GPU")
    given = parser.parse_args(arguments)
    if not given.cpu and not has_gpu():
        print("make gpu: no GPU that PyTorch can use; --cpu tries the script itself without one", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "log.txt").unlink(missing_ok=True)
    os.environ["ENCDIFF_COMMIT"] = commit()
    with tempfile.TemporaryDirectory() as folder:
        phases = plan(Path(folder), given.cpu)
        if given.only:
            only, names = given.only.split(","), [phase.name for phase in phases]
            if unknown := set(only) - set(names):
                parser.error(f"--only: no phase {min(unknown)!r}, must be among {', '.join(names)}")
            phases = [phase for phase in phases if phase.name in only]
        outcomes = run_all(phases, given.out.resolve(), 60 * given.minutes)
        collect(Path(folder), given.out)
    print((given.out / "summary.md").read_text())
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
