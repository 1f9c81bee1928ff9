"""Write whatever is written onto disks too small for it, of random sizes.

    python -m tests.campaign.full_disk [--count 200] [--seed 0]

Each case has a file system in memory of its own, mounted where only this process sees it. Linux asks no rights for
that where it lets users have namespaces; elsewhere nothing is done, and that is said. A writer must end, or raise an
error of one line that names the file; every file is then whole or the older one, and nothing else is there.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from encdiff import EncDiff, InputError
from encdiff.data import open_dataset
from encdiff.data.procedural import ProceduralShapes3D
from encdiff.data.shapes3d import Shapes3D, write_shapes3d
from encdiff.evaluation import write_metrics
from encdiff.files.checkpoint import load_tensors, save_tensors
from encdiff.pictures import save_png
from encdiff.profiling import trace
from encdiff.training import TrainConfig, train
from tests._tiny import TINY

OLDER = b"as it was"
SECONDS = 120  # for one case
REFUSED = 3  # exit status


class Noise(ProceduralShapes3D):
    """Images that no compression makes smaller."""

    def images(self, indices) -> np.ndarray:
        return noise(len(indices), self.image_size, self.image_size, 3)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def model() -> EncDiff:
    torch.manual_seed(0)
    return EncDiff(TINY)


def run(path: Path) -> None:
    config = TrainConfig(steps=2, batch_size=4, warmup=1, log_every=1, checkpoint_every=1, picture_every=1)
    data, tensorboard = open_dataset("procedural:2,1,1,1,1,1", TINY.image_size), find_spec("tensorboard") is not None
    train(model(), data, path, config, tensorboard=tensorboard)


def profile(path: Path) -> None:
    trace(torch.nn.Linear(2, 2), lambda: torch.ones(3, 3) @ torch.ones(3, 3), 300, path)


# What writes, under which name, and how many KiB that takes.
WRITERS: dict[str, tuple[Callable[[Path], None], str, int]] = {
    "render": (lambda path: write_shapes3d(path, Noise(32, (3, 3, 3, 4, 4, 3)), batch=100), "x.h5", 5000),
    "render small": (lambda path: write_shapes3d(path, Noise(16, (3, 3, 3, 4, 4, 3))), "x.h5", 2500),
    "published": (lambda path: model().save_published(path), "x.ckpt", 1500),
    "tensors": (lambda path: save_tensors(path, {"x": torch.zeros(100_000)}), "x.safetensors", 450),
    "pretrained": (lambda path: model().save_pretrained(path.parent), "model.safetensors", 1400),
    "picture": (lambda path: save_png(Image.fromarray(noise(200, 200, 3)), path), "x.png", 140),
    "metrics": (lambda path: write_metrics(path, {"x": noise(100_000).tolist()}), "x.json", 800),
    "profile": (profile, "x.json", 900),
    "run": (run, "run", 11_000),
}
READERS: dict[str, Callable[[Path], object]] = {
    ".h5": lambda path: Shapes3D(path).images(np.arange(432)),
    ".ckpt": lambda path: EncDiff.load_published(path, TINY),
    ".safetensors": load_tensors,
    ".png": lambda path: Image.open(path).load(),
    ".json": lambda path: json.loads(path.read_text()),
}


def attempt(name: str, folder: Path, said: Path) -> int:
    """The exit status of a forked child that writes: 0, or REFUSED for an error of one line that names a file."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.alarm(SECONDS)
        writer, file, _ = WRITERS[name]
        writer(folder / file)
        code = 0
    except (OSError, InputError) as error:
        traceback.print_exc()
        code = REFUSED if "\n" not in str(error) and str(folder) in str(error) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wrong_in(folder: Path) -> str | None:
    """What is wrong with what lies in a folder after an attempt."""
    for path in folder.rglob("*"):
        if path.name.startswith("."):
            return f"{path.name} is left over"
        if path.suffix in READERS and path.read_bytes() != OLDER:
            try:
                READERS[path.suffix](path)
            except Exception as error:
                return f"{path.name} is neither whole nor the older one: {error!r}"
    return None


def case(name: str, disk: Path, kib: int) -> tuple[str, str | None]:
    """How one attempt on a disk of so many KiB ended, and what is wrong with that."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(disk)], check=True)
    try:
        if WRITERS[name][1] != "run":
            (disk / WRITERS[name][1]).write_bytes(OLDER)
        said = disk.with_name("said")
        status = attempt(name, disk, said)
        ended = {0: "written", REFUSED: "refused"}.get(status, "FAILED")
        wrong = f"status {status}: {said.read_text()[-2000:]}" if ended == "FAILED" else wrong_in(disk)
        return "FAILED" if wrong else ended, wrong
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def campaign(cases: int, seed: int) -> int:
    chosen, outcomes, failures = random.Random(seed), Counter(), []
    torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as place:
        disk = Path(place, "disk")
        disk.mkdir()
        for i in range(cases):
            name = list(WRITERS)[i % len(WRITERS)]
            kib = chosen.randint(8, int(1.4 * WRITERS[name][2]))
            ended, wrong = case(name, disk, kib)
            outcomes[name, ended] += 1
            if wrong:
                failures.append(f"{name} on {kib} KiB: {wrong}")
    for (name, ended), count in sorted(outcomes.items()):
        print(f"{name:14} {ended:10} {count:5}")
    print(*failures, f"{cases} small disks, {len(failures)} failures", sep="\n")
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="how many disks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", action="store_true", help="mounts here are seen by this process only")
    given = parser.parse_args()
    if given.inside:
        return campaign(given.count, given.seed)
    apart = ["unshare", "--map-root-user", "--mount"]
    probe = "d=$(mktemp -d) && mount -t tmpfs none $d && umount $d && rmdir $d"
    try:
        subprocess.run([*apart, "sh", "-c", probe], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"left out: this system lets nothing be mounted ({getattr(error, 'stderr', '').strip() or error})")
        return 0
    return subprocess.run(
        [*apart, sys.executable, "-m", __spec__.name, *sys.argv[1:], "--inside"], check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
