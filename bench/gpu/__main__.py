"""`python -m bench.gpu`: see the package's docstring."""

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import bench.gpu as package
from bench.gpu.measures import LINES_OF, MEASURES, named

ROOT = Path(__file__).parents[2]
CALLS = {  # the blocks of each, what is wanted most first
    1: "beside,machine,step,profile,unet,sampling,whole,ops,tiles,compiled,published",
    2: "paper,shipped,beside,machine,compiled,step,unet,sampling,tiles,profile,whole,doctor",
    3: "beside,machine,tiles,tuned,profile,ops,unet,sampling,switches,prompts",
}
ASIDE = ("whole", "doctor")  # of a call with a training: in a process of their own, beside it
# all else is stopped
QUIET = {"machine", "step", "profile", "unet", "sampling", "ops", "published", "tuned", "switches", "prompts"}
SECONDS = {  # of each block at most
    "beside": 100, "machine": 8, "step": 40, "profile": 12, "compiled": 30, "tiles": 150, "tuned": 45, "sampling": 30,
    "whole": 25, "ops": 25, "published": 30, "unet": 15, "shipped": 80, "paper": 600, "doctor": 90,
    "switches": 90, "prompts": 25,
}  # fmt: skip
FIRST_STAGE, TESTS = 55, 100  # seconds of two workers
TAIL = 3  # seconds kept for packing
AFTER_TRAINING = 8  # seconds in which what ran beside it must end
LEARNING = 40  # seconds of a training at least, from its images on
READING = 25  # seconds after a training for its codes and what is read off them
LINES = 120  # of the summary at most
PACKED = (
    "*.json", "*.png", "summary.md", "tables.txt", "parts/*.log", "parts/*.json", "paper/*/*.json", "paper/*/*.png"
)  # fmt: skip


def link_kernels() -> None:
    """Make `encdiff.kernels` importable from a checkout that is not installed."""
    if importlib.util.find_spec("encdiff.kernels") is None and not (ROOT / "encdiff/kernels").exists():
        (ROOT / "encdiff/kernels").symlink_to(Path("../kernels"))


def commit() -> str:
    """Of the checkout, or what ENCDIFF_COMMIT says of a copy without history."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found = "unknown"
    return os.environ.get("ENCDIFF_COMMIT") or found


class Session:
    """One call: its workers, its blocks in order, its summary."""

    def __init__(self, lab, blocks: list[str], peers: tuple[str, ...] = (), runs: tuple[str, ...] = ()):
        self.lab, self.blocks, self.peers, self.runs, self.workers = lab, blocks, peers, runs, {}
        self.said = lab.load("said") or {}  # of a process before this one: see `go_on_anew`

    def start_workers(self) -> None:
        """Before anything is timed: what compiles longest first."""
        from bench.gpu.compiled import PEERS

        if "beside" not in self.blocks:
            return
        has, shares = set(self.blocks), range(1 if self.lab.cpu else 5)
        if "paper" in has and not (self.lab.out / "first_stage").exists():
            self.start("first stage", seconds=3 if self.lab.cpu else FIRST_STAGE)
        if has & {"paper", "tuned"}:
            self.start("warm")
        if "shipped" in has:
            self.start("shipped", seconds=self.seconds_of_shipped)
        if "compiled" in has:
            self.start(*(f"peer {name}" for name in PEERS if name in self.peers or not self.peers))
        self.start("build", *(f"right {n}/{len(shares)}" for n in shares))
        if "paper" not in has:
            self.start_later()

    def start_later(self) -> None:
        """What a training leaves room for."""
        shares = range(1 if self.lab.cpu else 5)
        if "paper" in self.blocks:
            self.start(*(f"aside {name}" for name in ASIDE if name in self.blocks))
            self.start("tests", seconds=TESTS)
        self.start(*(f"aside {name} ours" for name in ("unet", "sampling") if name in self.blocks))
        if "tiles" in self.blocks:
            self.start(*(f"tiles {n}/{len(shares)}" for n in shares))

    @property
    def seconds_of_shipped(self) -> float:
        return 2 if self.lab.cpu else SECONDS["shipped"] - 15

    def start(self, *names: str, seconds: float = 0) -> None:
        from bench.gpu import workers

        for name in names:
            self.workers[name] = workers.start(self.lab, name, "--seconds", str(seconds))

    def of(self, kind: str) -> dict:
        return {name: worker for name, worker in self.workers.items() if name.split()[0] == kind}

    def run(self) -> None:
        from bench.gpu.lab import Late, alarm

        self.start_workers()
        for n, name in enumerate(self.blocks):
            most = AFTER_TRAINING if name == "beside" and "paper" in self.blocks[:n] else SECONDS[name]
            seconds = min(most, self.lab.left - TAIL)
            self.pause(name in QUIET, "peer", "tiles", "aside")
            began = time.monotonic()
            try:
                if seconds < 2:
                    raise Late("not begun: no time left")
                with alarm(seconds):
                    lines = self.block(name, seconds)
            except Exception as error:
                lines = [f"{type(error).__name__}: {str(error).strip()[:400]}", *self.partial(name)]
            self.said[name] = (time.monotonic() - began, lines)
            print(f"== {name}: {time.monotonic() - began:.1f} s, {self.lab.left:.0f} s left", flush=True)
            self.write_summary()
            if lines and "CUDA error" in lines[0] and self.blocks[n + 1 :]:
                self.go_on_anew(self.blocks[n + 1 :])
        self.stop_workers()

    def pause(self, paused: bool, *kinds: str) -> None:
        for worker in (w for kind in kinds for w in self.of(kind).values()):
            worker.pause(paused)

    def stop_workers(self) -> None:
        for worker in self.workers.values():
            worker.stop()

    def go_on_anew(self, blocks: list[str]) -> None:
        """After an error that the device does not recover from within a process: the rest in a new one."""
        self.stop_workers()
        left = ["--only", ",".join(blocks), "--minutes", str(self.lab.left / 60), "--caches", str(self.lab.caches)]
        os.execv(sys.executable, [sys.executable, "-m", "bench.gpu", str(self.lab.out), "--go-on", *left])

    def block(self, name: str, seconds: float) -> list[str]:
        if own := getattr(self, f"block_{name}", None):
            return own(seconds)
        if worker := self.workers.get(f"aside {name}"):
            found = worker.wait(time.monotonic() + seconds - 1)
            return [found["error"]] if "error" in found else self.done(name, found)
        return self.done(name, named(MEASURES[name])(self.lab))

    def partial(self, name: str) -> list[str]:
        """What a block that did not end has left."""
        try:
            return self.describe(name, self.lab.load(name) or {})
        except Exception as error:
            return [f"({type(error).__name__} while reading what it left)"]

    def describe(self, name: str, found) -> list[str]:
        return named(LINES_OF[name])(found) if found and name in LINES_OF else []

    def done(self, name: str, found) -> list[str]:
        self.lab.save(name, found)
        return self.describe(name, found)

    def block_beside(self, seconds: float) -> list[str]:
        """Wait until the checks, tests and trainings are over."""
        from bench.gpu import checks, workers

        end, found = time.monotonic() + seconds - 3, []
        for name, worker in self.of("right").items():
            result = worker.wait(end)
            found += result if isinstance(result, list) else [checks.missing(name, result["error"])]
        said = self.done("right", found)
        for name, worker in (self.of("build") | self.of("first") | self.of("tests")).items():
            result = worker.wait(end)
            self.lab.save(name.replace(" ", "_"), result)
            lines = workers.test_lines(result) if name == "tests" else [json.dumps(result)[:300]]
            said += [f"{name}: {line}" for line in lines]
        ready = [name for name, worker in self.of("peer").items() if worker.ready()]
        return [*said, f"compiled peers ready: {', '.join(ready) or 'none'}"]

    def block_tiles(self, seconds: float) -> list[str]:
        from bench.gpu import tiles

        compiled = [worker.wait(time.monotonic() + seconds / 3) for worker in self.of("tiles").values()]
        return [f"compiled ahead: {json.dumps(compiled)[:200]}", *self.done("tiles", tiles.measure(self.lab))]

    def block_compiled(self, seconds: float) -> list[str]:
        end, found = time.monotonic() + seconds, {}
        peers = self.of("peer")
        while peers and time.monotonic() < end:
            name = next((n for n, worker in peers.items() if worker.ready()), None)
            if name is None:
                time.sleep(0.1)
                continue
            worker = peers.pop(name)
            self.pause(True, "peer", "tiles", "aside")
            worker.pause(False)
            worker.go()
            found[name.removeprefix("peer ")] = worker.wait(min(end, time.monotonic() + 20))
            self.pause(False, "peer", "tiles", "aside")
            self.lab.save("compiled", found)
        found |= {name.removeprefix("peer "): {"error": "not compiled in time"} for name in peers}
        return self.done("compiled", found)

    def block_paper(self, seconds: float) -> list[str]:
        from bench.gpu import paper

        changes = {"precision": "float32", "batch_size": 8} if self.lab.cpu else {}
        warm = next(iter(self.of("warm").values()), None)

        def ready() -> None:
            """The kernels of a step are compiled, by a process that took one."""
            if warm is not None:
                print("warm:", json.dumps(warm.wait(time.monotonic() + 60))[:200], flush=True)

        end = time.monotonic() + (4 if self.lab.cpu else seconds - READING)
        for worker in self.of("first").values():
            self.lab.save("first_stage_steps", worker.wait(end if self.lab.cpu else end - LEARNING))
        self.start_later()
        until = time.monotonic() + 90 if self.lab.cpu else end + READING - 2
        return self.done("paper", paper.measure(self.lab, self.runs, end, until, ready, **changes))

    def block_shipped(self, seconds: float) -> list[str]:
        if "shipped" not in self.workers:
            self.start("shipped", seconds=self.seconds_of_shipped)
        worker = self.workers["shipped"]
        worker.go()
        return self.done("shipped", worker.wait(time.monotonic() + seconds - 1))

    def write_summary(self) -> None:
        self.lab.save("said", self.said)
        text = [f"commit {os.environ['ENCDIFF_COMMIT']}"]
        room = LINES - 1 - len(self.said)
        limit = max(n for n in range(room + 1) if sum(min(n, len(lines)) for _, lines in self.said.values()) <= room)
        for name, (seconds, lines) in self.said.items():
            text += [f"== {name}, {seconds:.1f} s", *(line.replace("\n", " ") for line in shortened(lines, limit))]
        (self.lab.out / "summary.md").write_text("\n".join(text) + "\n")


def shortened(lines: list[str], limit: int) -> list[str]:
    """At most so many lines, the last of which then says how many there are more."""
    return lines if len(lines) <= limit else [*lines[: limit - 1], f"... {len(lines) - limit + 1} more in said.json"]


def pack(folder: Path, archive: Path, *names: str) -> None:
    with tarfile.open(archive, "w:gz", compresslevel=3) as tar:
        for name in names:
            for path in sorted(folder.glob(name)):
                tar.add(path, arcname=path.relative_to(folder))


def asked(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """What the command line says, and the blocks that it means."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=package.__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument(
        "--call",
        type=int,
        default=1,
        choices=sorted(CALLS),
        help="which blocks: 1, checks and times; 2, trainings; 3, the sweep of tiles and what it brings",
    )
    parser.add_argument("--minutes", type=float, help="for everything together; default: 5.5, of call 2 8.6")
    parser.add_argument(
        "--train", type=float, default=375, help="seconds of the block `paper`, from its first stage on"
    )
    parser.add_argument(
        "--runs", default="uniform", help="of the block `paper`, trained in turns; default: %(default)s"
    )
    parser.add_argument("--peers", help="these compiled peers alone, such as 'published step,ops'")
    parser.add_argument("--only", help="these blocks, such as right,step")
    parser.add_argument("--caches", type=Path, help="folder of what Triton and Inductor compiled; default OUT/caches")
    parser.add_argument("--cpu", action="store_true", help="go through the same code without a GPU, on a tiny model")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--go-on", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    blocks = (given.only or CALLS[given.call]).split(",")
    if unknown := sorted(set(blocks) - SECONDS.keys()):
        parser.error(f"--only: no block {unknown[0]!r}, must be among {', '.join(SECONDS)}")
    return given, blocks


def main(arguments: list[str] | None = None) -> int:
    given, blocks = asked(arguments)
    out = given.out.resolve()
    caches = (given.caches or out / "caches").resolve()
    os.environ["TRITON_CACHE_DIR"], os.environ["TORCHINDUCTOR_CACHE_DIR"] = (
        str(caches / "triton"),
        str(caches / "inductor"),
    )
    os.environ["ENCDIFF_COMMIT"] = commit()
    os.environ["ENCDIFF_SELF_CHECK"] = "0"  # the blocks `right` and `doctor` check; nothing else is to wait for it
    if given.cpu:
        os.environ["TRITON_INTERPRET"] = "1"
    link_kernels()
    import torch

    if not given.cpu and not torch.cuda.is_available():
        print("bench.gpu: no GPU that PyTorch can use; --cpu goes through the same code without one", file=sys.stderr)
        return 2
    from bench.gpu import compiled, paper, workers
    from bench.gpu.lab import Lab

    peers, runs = (tuple(names.split(",")) if names else () for names in (given.peers, given.runs))
    for option, names, known in (("--peers", peers, compiled.PEERS), ("--runs", runs, paper.VARIANTS)):
        if unknown := [name for name in names if name not in known]:
            print(f"bench.gpu: {option}: no {unknown[0]!r}, must be among {', '.join(known)}", file=sys.stderr)
            return 2
    out.mkdir(parents=True, exist_ok=True)
    SECONDS["paper"] = given.train
    minutes = given.minutes or (8.6 if given.call == 2 else 5.5)
    lab = Lab(out, caches, given.cpu, time.monotonic() + 60 * minutes)
    if given.worker:
        workers.work(lab, given.worker, given.seconds)
        return 0
    if not given.go_on:
        shutil.rmtree(out / "paper", ignore_errors=True)  # of an earlier run into the same folder
        for name in ("said", "right", "tests", *SECONDS):
            (out / f"{name}.json").unlink(missing_ok=True)
        (out / "tables.txt").unlink(missing_ok=True)
    session = Session(lab, blocks, peers, runs)
    session.run()
    pack(out, out / "results.tgz", *PACKED)
    print((out / "summary.md").read_text())
    failed = (lab.load("tests") or {}).get("FAILED", 0)
    return int(failed > 0 or any(not r["ok"] for r in lab.load("right") or []))


if __name__ == "__main__":
    sys.exit(main())
