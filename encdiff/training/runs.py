"""A training run on disk: its folder, its log, and the optimiser's state as named tensors."""

import csv
import fcntl
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from encdiff.distributed.launch import launch_id
from encdiff.errors import InputError
from encdiff.files.reading import read_json, refuse_special, whole_number
from encdiff.files.temporaries import atomic_path, clear, errors_of, is_temporary

log = logging.getLogger("encdiff.training.runs")


class RunFolder:
    """A run's folder: `config.json`, `log.csv`, `checkpoint.safetensors`, `samples/`, `model/`, and what shows it.

    A folder that already holds something is refused, unless `resume` continues its checkpoint or `overwrite` replaces
    the run in it; so is one that another training writes to. Nothing is written before `begin`, but for the lock on a
    folder that is there already: inside `with` the run is this training's alone.
    """

    SHOWN = ("metrics.json", "importance.png", "bottleneck.png", "pictures", "fields")  # of one state of the model
    OWN = ("config.json", "log.csv", "checkpoint.safetensors", "samples", "model", "tensorboard", *SHOWN)
    IGNORED = (
        ".lock",
        ".launch",
        ".DS_Store",
        "Thumbs.db",
        "desktop.ini",
    )  # a killed training's, and what desktops leave

    def __init__(self, path: str | Path, resume: bool = False, overwrite: bool = False, check: bool = True):
        self.path = Path(path)
        if resume and overwrite:
            raise InputError("resume and overwrite cannot both be given")
        self.resume, self.overwrite, self._lock = resume, overwrite, _Lock(self.path)
        self.restarted = False  # by its launcher
        if check:
            self.check()

    def check(self) -> None:
        """InputError where this is no folder for the run, or another training writes to it."""
        self._restart()
        self._lock.check()
        self._check()

    def __enter__(self) -> "RunFolder":
        if self.path.is_dir():
            self._take()
        return self

    def _restart(self) -> None:
        """Where this very launch began the run before it was restarted, go on: from its checkpoint, or anew.

        Not where this very process began it: a second training in its folder is as it is without a launch.
        """
        if (mine := launch_id()) is None or not self.launch.is_file():
            return
        launch, _, process = self.launch.read_text("utf-8", "replace").partition("\n")
        if launch == mine[0] and process != mine[1]:
            self.resume, self.restarted = self.checkpoint.is_file(), True
            self.overwrite = not self.resume

    def __exit__(self, *error) -> None:
        self._lock.release()

    def _take(self) -> None:
        self._lock.take()
        try:
            self._check()  # as it is now that nobody else can change it
        except InputError:
            self._lock.release()
            raise

    def _check(self) -> None:
        if self.resume and not self.checkpoint.is_file():
            raise InputError(
                f"{self.checkpoint}: no checkpoint to resume; begin the run with overwrite=True (--overwrite)"
            )
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: is a file, must be a folder")
        there = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
        held = [name for name in there if name not in self.IGNORED and not is_temporary(name)]
        if held and not self.resume and not self.overwrite:
            ways = "continue it with resume=True (--resume) or replace it with overwrite=True (--overwrite)"
            raise InputError(f"{self.path}: holds something already; {ways}")
        foreign = [name for name in held if name not in self.OWN]
        if foreign and self.overwrite:
            raise InputError(f"{self.path}: will not overwrite a folder that also holds {foreign[0]}")

    def begin(self) -> None:
        """Make the folder, or clear it of the run before; to be called once nothing can be refused any more."""
        if not self._lock.held:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take()
        if not self.resume:
            self._remove(self.OWN)
        if (mine := launch_id()) is not None:  # before anything that a restart would take for a run of others
            with atomic_path(self.launch) as temporary:
                temporary.write_text("\n".join(mine))
        for folder in (self.path, self.samples, self.model, self.path / "pictures"):
            clear(folder, alone=True)
        self.samples.mkdir(exist_ok=True)

    def forget_shown(self) -> None:
        """Remove what shows the model as it was; to be called before another is saved."""
        self._remove(self.SHOWN)

    def _remove(self, names: tuple[str, ...]) -> None:
        for name in names:
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def launch(self) -> Path:
        return self.path / ".launch"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def write_config(self, values: dict[str, Any]) -> None:
        with atomic_path(self.path / "config.json") as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n")

    def check_same_run(self, described: dict[str, Any]) -> None:
        """A resumed run may be logged otherwise, or made longer; anything else would make it another run."""
        now, before = json.loads(json.dumps(described)), read_config(self.path)
        free = {"log_every", "checkpoint_every", "picture_every", "scaling_factor", "engine", "checkpoint_activations"}
        free |= {"shard"}
        free.add("name")  # of the data: of a file or folder that may have been moved; its images are compared
        shaped = "learning rate" if now["training"].get("decay") else "capacity"  # by the number of steps
        if shaped == "capacity" and not now["model"].get("capacity_rise"):
            free.add("steps")
        for part in ("model", "training", "fingerprint"):
            for name, value in now[part].items():
                was = before.get(part, {}).get(name, value)  # a field that is younger than the run is as it was
                if name not in free and was != value:
                    why = f": the {shaped} depends on it; use another folder" if name == "steps" else ""
                    said = f"{self.path}: was begun with {name} {was!r}, cannot be resumed with {value!r}{why}"
                    raise InputError(said)


class _Lock:
    """At most one training writes to a folder: the lock on its file `.lock`, which the kernel lifts when the process
    ends, however it ends."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / ".lock"
        self._file: IO[str] | None = None

    @property
    def held(self) -> bool:
        return self._file is not None

    def check(self) -> None:
        """InputError if another training holds it."""
        if self.path.is_file():
            with suppress(FileNotFoundError), self.path.open() as file:  # it may be released between the two
                self._flock(file, fcntl.LOCK_SH)

    def take(self) -> None:
        while self._file is None:
            file = self.path.open("a+")
            try:
                self._flock(file, fcntl.LOCK_EX)
                with suppress(FileNotFoundError):  # it was released, and with that removed, between the two
                    if self.path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                        self._file = file
            finally:
                if not self.held:
                    file.close()
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def release(self) -> None:
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def _flock(self, file, mode: int) -> None:
        try:
            fcntl.flock(file, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            said = f"{self.folder}: a training writes to it now, process {file.read().strip() or 'unknown'}"
            raise InputError(f"{said}; stop that one, wait for its end, or use another folder") from None
        except OSError as error:  # not every network's file system has locks
            log.warning("%s: cannot be locked (%s); see that one training at a time writes to it", self.folder, error)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, the folder is this process's alone; InputError where a training, or what trains in it, has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = _Lock(folder)
    lock.take()
    try:
        yield
    finally:
        lock.release()


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """The `config.json` of a run folder: model, training, data, its fingerprint, version."""
    path = Path(run_dir) / "config.json"
    try:
        config = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file; {run_dir} must be the folder of a training run") from None
    parts = {"model": dict, "training": dict, "data": str, "fingerprint": dict}
    held = config if isinstance(config, dict) else {}
    held = {"fingerprint": {}} | held  # younger than the others
    if not all(isinstance(held.get(k), t) for k, t in parts.items()):
        raise InputError(f"{path}: not the configuration of a training run")
    return held


class CsvLog:
    """Rows of numbers by column, "step" and "seconds" among them; each row is on disk when `write` returns."""

    def __init__(self, path: Path, columns: tuple[str, ...], step: int = 0):
        """Keep the rows up to `step`, and drop those that an interrupted run left after it."""
        kept = _rows(path, columns, step) if step and path.is_file() else []
        with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(kept)
        self.path, self.columns = path, columns
        self.seconds = float(kept[-1]["seconds"]) if kept else 0.0  # spent before this log began

    def write(self, **row: float) -> None:
        with errors_of(self.path), self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)


def _rows(path: Path, columns: tuple[str, ...], step: int) -> list[dict[str, str]]:
    kept = []
    refuse_special(path)
    with path.open(newline="", encoding="utf-8", errors="replace") as file, suppress(csv.Error):
        for row in csv.DictReader(file):
            at, seconds = whole_number(row.get("step")), row.get("seconds") or ""
            try:
                torn = not math.isfinite(float(seconds)) or not all(
                    _number(row.get(column) or "") for column in columns
                )
            except (TypeError, ValueError):
                torn = True
            if torn or at is None:  # in the writing: it ends the log
                break
            if at <= step:
                kept.append({column: row[column] for column in columns})
    return kept


def _number(text: str) -> bool:
    float(text)
    return True


def last_row(path: Path) -> tuple[int, float]:
    """Step and seconds of the last whole row of a log; InputError without one."""
    rows = _rows(path, ("step", "seconds"), 2**53)
    if not rows or int(rows[-1]["step"]) < 1:
        raise InputError(f"{path}: holds no row of a training; must be the log of a run")
    return int(rows[-1]["step"]), float(rows[-1]["seconds"])


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str = "optimizer") -> dict[str, Tensor]:
    """The optimiser's state as named tensors: `{prefix}.{parameter}.{key}`."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{i}.{key}": torch.as_tensor(v) for i, entry in state.items() for key, v in entry.items()}


def optimizer_state(
    parameters: Sequence[Tensor], tensors: dict[str, Tensor], source: str | Path, prefix: str = "optimizer"
) -> dict[int, dict[str, Tensor]]:
    """What `optimizer_tensors` took from Adam, by the parameter's index, moments with the parameter's strides.

    Raises InputError, naming `source`, unless there are a step and both moments for some of the parameters, and they
    fit: a fused optimiser runs over memory and would read beyond a smaller one.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix + "."):
            text, _, key = name.removeprefix(prefix + ".").partition(".")
            index = whole_number(text, len(parameters) - 1)
            like = None if index is None or str(index) != text else parameters[index]
            if index is None or like is None or tensor.shape != (() if key == "step" else like.shape):
                raise InputError(f"{source}: {name} {tuple(tensor.shape)} fits no parameter of this configuration")
            if not _is_moment(tensor, key):
                raise InputError(f"{source}: {name} holds no finite numbers, or impossible ones; it is damaged")
            if key != "step":  # with the strides of its parameter
                tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
            state.setdefault(index, {})[key] = tensor
    if not state or any(entry.keys() != {"step", "exp_avg", "exp_avg_sq"} for entry in state.values()):
        raise InputError(f"{source}: the state of the optimiser {prefix!r} is missing or incomplete")
    return state


def _is_moment(tensor: Tensor, key: str) -> bool:
    """Whether these can be numbers of Adam: floats, squares and steps not negative, steps whole."""
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        return False
    return key == "exp_avg" or (bool((tensor >= 0).all()) and (key != "step" or float(tensor).is_integer()))


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], source: str | Path, prefix: str = "optimizer"
) -> None:
    """Put back what `optimizer_tensors` took from Adam; the hyper-parameters stay those of `optimizer`.

    Raises InputError as `optimizer_state`.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = optimizer_state(parameters, tensors, source, prefix)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def step_generator(seed: int, step: int) -> torch.Generator:
    """Random numbers from seed and step alone: a resumed run repeats them."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**63
    return torch.Generator().manual_seed(mixed)
