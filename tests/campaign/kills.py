"""Kill trainings and writers at random moments; continued, each must end as one that nobody killed.

    python -m tests.campaign.kills [--count 200] [--seed 0]

A child is forked for each start, so that kills fall into the work and not into imports. After every kill what lies
under a final name must be whole; at the end of each run all files must be those of an unbroken run, to the bit but for
times, and nothing may be left over.
"""

import argparse
import csv
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # the first optimiser of every child would
from PIL import Image

from encdiff import EncDiff
from encdiff.data import open_dataset
from encdiff.data.shapes3d import Shapes3D, write_shapes3d
from encdiff.evaluation import write_metrics
from encdiff.files.checkpoint import load_tensors
from encdiff.files.temporaries import is_temporary
from encdiff.models.autoencoder import VQAutoencoder
from encdiff.pictures import save_png
from encdiff.training import AutoencoderTrainConfig, TrainConfig, train, train_autoencoder
from tests._tiny import TINY

EVERY = dict(log_every=1, checkpoint_every=2, picture_every=3)  # a picture takes longer than a step
ROOM, LARGER = "procedural:2,1,1,1,1,1", "procedural:5,5,5,2,2,2"
SHARES = {"training": 0.5, "first stage": 0.2, "render": 0.15, "model files": 0.15}  # of the kills


def training(folder: Path) -> None:
    torch.manual_seed(0)
    config = TrainConfig(steps=8, batch_size=4, warmup=1, **EVERY)
    train(EncDiff(TINY), open_dataset(ROOM, TINY.image_size), folder, config, **_mode(folder))


def first_stage(folder: Path) -> None:
    torch.manual_seed(0)
    model = VQAutoencoder(width=32, multipliers=(1,), depth=1, codebook_size=64)
    config = AutoencoderTrainConfig(steps=8, batch_size=2, disc_layers=1, **EVERY)
    train_autoencoder(model, open_dataset(ROOM, TINY.image_size), folder, config, **_mode(folder))


def _mode(folder: Path) -> dict[str, bool]:
    """What a person does after a kill: continue the run, or begin it again where it has no checkpoint."""
    begun = (folder / "checkpoint.safetensors").is_file()
    return {"resume": begun, "overwrite": not begun}


def render(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    write_shapes3d(folder / "room.h5", open_dataset(LARGER, 32), batch=50)


def model_files(folder: Path) -> None:
    """The same files again and again, as an evaluation beside a training may."""
    torch.manual_seed(0)
    model, numbers = EncDiff(TINY), np.random.default_rng(0)
    picture = Image.fromarray(numbers.integers(0, 256, (256, 256, 3), np.uint8))
    for _ in range(5):
        model.save_pretrained(folder)
        model.save_published(folder / "published.ckpt")
        save_png(picture, folder / "picture.png")
        write_metrics(folder / "metrics.json", {"importance": numbers.random(20_000).tolist()})


WORK = {"training": training, "first stage": first_stage, "render": render, "model files": model_files}


def start(work: Callable[[Path], None], folder: Path, said: Path) -> int:
    """A forked child that does the work; what it has to say goes to a file."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work(folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int, until: Callable[[], bool]) -> int | None:
    """The child's exit status; None if it still runs when that moment has come."""
    while not until():
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.0005)
    return None


def kill(pid: int) -> int | None:
    """The child's exit status if it had ended by itself."""
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return None if os.WIFSIGNALED(status) else status


def files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def is_hidden(path: Path) -> bool:
    """Whether a file has no final name."""
    return any(part == ".lock" or is_temporary(part) for part in path.parts)


def state(folder: Path) -> dict[str, object]:
    """Every file of a folder by name, without the times that are in some."""
    return {str(path.relative_to(folder)): _content(path) for path in files(folder)}


def _content(path: Path) -> object:
    if is_hidden(path):
        return path.read_bytes()
    if path.name == "log.csv":
        with path.open(newline="") as rows:
            return [
                {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
                for row in csv.DictReader(rows)
            ]
    if path.suffix == ".safetensors":  # its header is in no order
        tensors, metadata = load_tensors(path)
        return metadata, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    if path.suffix == ".h5":  # it holds the time
        data = Shapes3D(path)
        return data.factor_sizes, data.images(np.arange(len(data))).tobytes()
    return path.read_bytes()


def check_whole(folder: Path) -> None:
    """Whatever has its final name can be read."""
    for path in files(folder):
        _content(path)
        if not is_hidden(path):
            if path.suffix == ".png":
                Image.open(path).load()
            if path.suffix == ".ckpt":
                EncDiff.load_published(path, TINY)


def is_written(folder: Path) -> bool:
    """Whether a file is half written."""
    return any(is_temporary(path.name) for path in folder.rglob(".*"))


class Campaign:
    def __init__(self, place: Path, seed: int):
        self.place, self.said, self.random = place, place / "said", random.Random(seed)
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []

    def run(self, name: str, kills: int) -> None:
        """Kill one kind of work so many times, in as many runs as that takes."""
        began, folder = time.monotonic(), self._folder()
        if os.waitpid(start(WORK[name], folder, self.said), 0)[1]:
            self._fail(name, f"fails undisturbed: {self.said.read_text()}")
            return
        seconds, whole = time.monotonic() - began, state(folder)
        while kills > 0:
            kills -= self._one(name, whole, seconds, kills)

    def _one(self, name: str, whole: dict, seconds: float, most: int) -> int:
        """One run, killed at most so many times; how often it was."""
        folder, kills, status = self._folder(), 0, None
        while status is None:
            pid = start(WORK[name], folder, self.said)
            if kills == most:
                status = os.waitpid(pid, 0)[1]
            elif (status := wait(pid, self._moment(folder, seconds))) is None and (status := kill(pid)) is None:
                kills += 1
                self._check_killed(name, folder)
        self._check_ended(name, folder, status, whole)
        shutil.rmtree(folder.parent)
        return kills

    def _moment(self, folder: Path, seconds: float) -> Callable[[], bool]:
        """A random one of the work's time, or the first one after it at which a file is half written."""
        end, aimed = time.monotonic() + self.random.uniform(0, 0.8 * seconds), self.random.random() < 0.5
        return lambda: time.monotonic() > end and (not aimed or is_written(folder))

    def _check_killed(self, name: str, folder: Path) -> None:
        self.outcomes[name, "killed within a file" if is_written(folder) else "killed between files"] += 1
        try:
            check_whole(folder)
        except Exception:
            self._fail(name, f"after a kill: {traceback.format_exc()}")

    def _check_ended(self, name: str, folder: Path, status: int, whole: dict) -> None:
        found = state(folder)
        if status:
            self._fail(name, f"ended with status {status}: {self.said.read_text()}")
        elif wrong := sorted(file for file in whole.keys() | found.keys() if whole.get(file) != found.get(file)):
            kinds = ["missing" if f not in found else "left over" if f not in whole else "different" for f in wrong]
            self._fail(name, ", ".join(f"{f} is {kind}" for f, kind in zip(wrong, kinds, strict=True)))
        elif extra := [path.name for path in folder.rglob("*") if path.name.startswith(".")]:
            self._fail(name, f"left over: {extra}")
        else:
            self.outcomes[name, "ended as if never killed"] += 1

    def _folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.place)) / "run"

    def _fail(self, name: str, why: str) -> None:
        self.outcomes[name, "FAILED"] += 1
        self.failures.append(f"{name}: {why}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="how many kills")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as place:
        campaign = Campaign(Path(place), given.seed)
        for name, share in SHARES.items():
            campaign.run(name, round(share * given.count))
    for (name, outcome), count in sorted(campaign.outcomes.items()):
        print(f"{name:12} {outcome:26} {count:5}")
    total = sum(count for (_, outcome), count in campaign.outcomes.items() if outcome.startswith("killed"))
    print(*campaign.failures, f"{total} kills, {len(campaign.failures)} failures", sep="\n")
    return 1 if campaign.failures else 0


if __name__ == "__main__":
    sys.exit(main())
