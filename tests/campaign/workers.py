"""Kill processes of a launch at random: torchrun restarts them, and the run must end as one that nobody killed.

    python -m tests.campaign.workers [--count 20] [--seed 0]

Two processes train; one of them is killed at a random moment, so often, and the checkpoint at the end must be that of
two processes which nobody killed, to the bit. So must that of two launchers, as of two machines, that meet at a port.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent


def launch(out: Path, *options: str) -> subprocess.Popen:
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval", "0.1", *options]
    command += [str(ROOT / "tests/_several.py"), str(out), "long"]
    said = (out / "said.txt").open("a")
    return subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"})


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in listed.stdout.split()]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def killed(out: Path, count: int, rng: random.Random) -> int:
    """Train while a process is killed so often; returns how often one was."""
    agent, kills = launch(out, "--standalone", "--nproc-per-node", "2", "--max-restarts", str(count)), 0
    checkpoint, began = out / "long/checkpoint.safetensors", time.monotonic()
    while kills < count and agent.poll() is None:
        before = checkpoint.stat().st_mtime_ns if checkpoint.is_file() else 0
        if rng.random() < 0.8:  # after another checkpoint, so that the run gets on; else at any moment
            while agent.poll() is None and (checkpoint.stat().st_mtime_ns if checkpoint.is_file() else 0) == before:
                time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        if found := children(agent.pid):
            os.kill(rng.choice(found), signal.SIGKILL)
            kills += 1
            print(f"killed {kills} of {count} after {time.monotonic() - began:.0f} s", flush=True)
            while agent.poll() is None and set(children(agent.pid)) & set(found):
                time.sleep(0.05)
    if agent.wait() != 0:
        raise AssertionError(f"the launcher ended with {agent.returncode}: {(out / 'said.txt').read_text()[-3000:]}")
    return kills


def two_machines(out: Path) -> None:
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "two"]
    where += ["--rdzv-endpoint", f"localhost:{free_port()}"]
    agents = [launch(out, *where) for _ in range(2)]
    if any(agent.wait() for agent in agents):
        raise AssertionError((out / "said.txt").read_text()[-3000:])


def difference(one: Path, other: Path) -> float:
    """The greatest of any number in two checkpoints; of another step infinity."""
    a, b = (load_file(out / "long/checkpoint.safetensors") for out in (one, other))
    if a.keys() != b.keys():
        return float("inf")
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        whole, out, two = (Path(folder) / name for name in ("whole", "killed", "two"))
        if launch(whole, "--standalone", "--nproc-per-node", "2").wait():
            raise AssertionError((whole / "said.txt").read_text()[-3000:])
        kills = killed(out, given.count, random.Random(given.seed))
        two_machines(two)
        for name, other in ((f"{kills} kills", out), ("two launchers", two)):
            found = difference(whole, other)
            failures += found > 0
            print(f"{name}: the checkpoint differs by {found:.1e}")
    print(f"{kills} kills, {failures} failures")
    return 1 if failures or kills < given.count else 0


if __name__ == "__main__":
    sys.exit(main())
