"""What every training run needs around its steps: a folder, a log, a bar, and a way to stop without losing anything."""

import csv
import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from encdiff.checkpoint import atomic_path
from encdiff.errors import InputError


class Stopped(Exception):
    """Training ended early on request; everything is saved."""


class RunFolder:
    """A run's folder: `config.json`, `log.csv`, `checkpoint.safetensors`, `samples/` and, at the end, `model/`.

    A folder that already holds something is refused, unless `resume` continues its checkpoint or `overwrite` replaces
    the run in it. Nothing is written before `begin`.
    """

    OWN = (
        "config.json", "log.csv", "checkpoint.safetensors", "samples", "model", "tensorboard",
        "metrics.json", "importance.png", "pictures",
    )  # fmt: skip

    def __init__(self, path: str | Path, resume: bool = False, overwrite: bool = False):
        self.path = Path(path)
        if resume and overwrite:
            raise InputError("resume and overwrite cannot both be given")
        if resume and not self.checkpoint.is_file():
            raise InputError(f"{self.checkpoint}: no checkpoint to resume; leave out --resume to begin a run")
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: is a file, must be a folder")
        if self.path.is_dir() and any(self.path.iterdir()) and not resume:
            if not overwrite:
                raise InputError(f"{self.path}: holds something already; continue it with --resume or use --overwrite")
            self._check_own()
        self.resume = resume

    def begin(self) -> None:
        """Make the folder, or empty it for another run; to be called once nothing can be refused any more."""
        if self.path.is_dir() and not self.resume:
            shutil.rmtree(self.path)
        self.samples.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def write_config(self, values: dict[str, Any]) -> None:
        with atomic_path(self.path / "config.json") as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n")

    def read_config(self) -> dict[str, Any]:
        return read_config(self.path)

    def check_same_run(self, described: dict[str, Any]) -> None:
        """A resumed run may be made longer or logged otherwise; anything else would make it another run."""
        free = {"steps", "log_every", "checkpoint_every", "picture_every"}
        before, now = self.read_config(), json.loads(json.dumps(described))
        for part in ("model", "training"):
            for name, value in now[part].items():
                was = before[part].get(name)
                if name not in free and was != value:
                    raise InputError(f"{self.path}: was begun with {name} {was!r}, cannot be resumed with {value!r}")

    def log(self, columns: tuple[str, ...], step: int = 0) -> "CsvLog":
        """The run's log, without the rows after `step` that an interrupted run left behind."""
        return CsvLog(self.path / "log.csv", columns, step)

    def _check_own(self) -> None:
        foreign = sorted(p.name for p in self.path.iterdir() if p.name not in self.OWN)
        if foreign:
            raise InputError(f"{self.path}: will not overwrite a folder that also holds {foreign[0]}")


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """The `config.json` of a run folder: model, training, data, version."""
    path = Path(run_dir) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file; {run_dir} must be the folder of a training run") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict) or not {"model", "training", "data"} <= set(config):
        raise InputError(f"{path}: not the configuration of a training run")
    return config


class CsvLog:
    """Rows of numbers, the first column the step; each row is on disk when `write` returns."""

    def __init__(self, path: Path, columns: tuple[str, ...], step: int = 0):
        kept: list[dict] = []
        if step and path.is_file():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row[columns[0]]) <= step]
        with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        self.path, self.columns = path, columns

    def write(self, **row: float) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)


class Interrupt:
    """Inside the block the first Ctrl-C or SIGTERM only sets `requested`; the second ends the program."""

    requested = False

    def __enter__(self) -> "Interrupt":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere signals cannot be caught
            self.before = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _request(self, signum: int, _) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def training_bar(total: int, step: int) -> Iterator[Progress]:
    """A bar with loss, images per second and time left; `bar.update(0, completed=..., loss=..., speed=...)`."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[speed]:.0f} images/s"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, refresh_per_second=2, speed_estimate_period=60) as bar:
        bar.add_task("training", total=total, completed=step, loss=float("nan"), speed=0.0)
        yield bar


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for anything else; yields `report(done, total)`."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str = "optimizer") -> dict[str, Tensor]:
    """The optimiser's state as named tensors: `{prefix}.{parameter}.{key}`."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{i}.{key}": torch.as_tensor(v) for i, entry in state.items() for key, v in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str = "optimizer") -> None:
    """Put back what `optimizer_tensors` took; the hyper-parameters stay those of `optimizer`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix + "."):
            index, key = name.removeprefix(prefix + ".").split(".")
            like = parameters[int(index)]
            if tensor.shape == like.shape:  # fused optimisers run over memory: moments need the parameter's strides
                tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one training step, from seed and step alone: a resumed run repeats them."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**63
    return torch.Generator().manual_seed(mixed)
